"""Figures of a running server: as JSON for the page, and as Prometheus' text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekv.host.proc import status_nbytes
from edgekv.serve.engine_process import EngineProcess

if TYPE_CHECKING:
    from edgekv.serve.peers.router import Router

# name: (kind, help); kinds and the text's form are those of Prometheus' exposition format 0.0.4
METRICS = {
    "requests_total": ("counter", "Requests to the model."),
    "requests_refused_total": ("counter", "Requests that found the queue full."),
    "engine_deaths_total": ("counter", "Deaths of the engine's process."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "reused_tokens_total": ("counter", "Tokens of prompts that were found in the cache."),
    "generated_tokens_total": ("counter", "Tokens of finished answers."),
    "running": ("gauge", "Requests that are being answered."),
    "waiting": ("gauge", "Requests in the queue."),
    "cache_cells": ("gauge", "Tokens that the cache holds at most."),
    "cache_cells_used": ("gauge", "Tokens in the cache."),
    "cache_cells_kept": ("gauge", "Of those, the ones that are kept for later prompts."),
    "cache_bytes": ("gauge", "Bytes of the whole cache."),
    "prefill_tokens_per_second": (
        "gauge",
        "Prompt tokens per second of the engine's last half second of work.",
    ),
    "decode_tokens_per_second": ("gauge", "Tokens per second of all answers, likewise."),
    "disk_bytes": ("gauge", "Bytes of what is kept on disk."),
    "disk_errors_total": ("counter", "Times that nothing could be written there."),
    "disk_damaged_total": ("counter", "Files there that were found to be damaged."),
    "restored_tokens_total": ("counter", "Tokens of prompts that were read from there."),
    "engine_resident_bytes": ("gauge", "Resident memory of the engine's process."),
    "server_resident_bytes": ("gauge", "Resident memory of the server's process."),
    "peers": ("gauge", "Other servers that are known."),
    "peers_usable": ("gauge", "Of those, the ones that are asked."),
    "routed_total": ("counter", "Requests that other servers answered."),
    "fetched_total": ("counter", "Requests for which rows came from other servers."),
    "peer_failures_total": ("counter", "Times that another server failed, and a request went another way."),
    "up": ("gauge", "1 while there is an engine."),
}


def figures(engine: EngineProcess, router: Router | None = None) -> dict[str, float]:
    """The value of every metric now; those that the system does not tell are missing."""
    counts, stats, about = engine.counts, engine.stats, engine.about
    values = {
        "requests_total": counts.n_requests,
        "requests_refused_total": counts.n_busy,
        "engine_deaths_total": counts.n_deaths,
        "prompt_tokens_total": counts.n_prompt,
        "reused_tokens_total": counts.n_reused,
        "generated_tokens_total": counts.n_generated,
        "running": engine.n_running,
        "waiting": engine.n_waiting,
        "cache_cells": about["n_cells"],
        "cache_cells_used": stats.get("cells_used", 0),
        "cache_cells_kept": stats.get("cells_kept", 0),
        "cache_bytes": about["cache_nbytes"],
        "prefill_tokens_per_second": round(stats.get("prefilled_tps", 0.0), 2),
        "decode_tokens_per_second": round(stats.get("generated_tps", 0.0), 2),
        "disk_bytes": stats.get("disk_bytes"),
        "disk_errors_total": stats.get("disk_errors"),
        "disk_damaged_total": stats.get("disk_damaged"),
        "restored_tokens_total": stats.get("n_restored"),
        "engine_resident_bytes": status_nbytes(engine.pid).get("VmRSS"),
        "server_resident_bytes": status_nbytes().get("VmRSS"),
        "up": int(engine.ready),
        **(router.figures() if router else {}),
    }
    return {name: value for name, value in values.items() if value is not None}


def status(engine: EngineProcess, model: str, router: Router | None = None) -> dict[str, Any]:
    """What the page shows, and what is known of other servers."""
    names = ("name", "kernel", "n_ctx", "n_parallel", "has_template")
    known = {"peers": [peer.about() for peer in router.peers]} if router else {}
    about = {name: engine.about[name] for name in names}
    return {"model": model, **about, "figures": figures(engine, router), **known}


def prometheus(engine: EngineProcess, router: Router | None = None) -> str:
    """The metrics as text."""
    lines = []
    for name, value in figures(engine, router).items():
        kind, words = METRICS[name]
        full = f"edgekv_{name}"
        lines += [f"# HELP {full} {words}", f"# TYPE {full} {kind}", f"{full} {value}"]
    return "\n".join(lines) + "\n"
