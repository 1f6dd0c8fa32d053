"""Where a question is answered: what it costs to send it to the cache, to fetch the cache, or to compute it anew."""
