#!/usr/bin/env bash
# PyPI's litellm against a running server, in a virtual environment of its own, since it brings two dozen packages:
#     benchmarks/serve/litellm.sh http://127.0.0.1:8080 [FOLDER]
# Whole, streamed, with a schema and an error, synchronous and not; exits with 1 if one of them is not as it should be.
set -euo pipefail
address=$1
folder=${2:-$(mktemp -d)}
[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
"$folder/bin/python" -c 'import litellm' 2>/dev/null || "$folder/bin/pip" install -q litellm
LITELLM_LOCAL_MODEL_COST_MAP=True "$folder/bin/python" - "$address" <<'PYTHON'
import asyncio, json, sys, urllib.request
from importlib.metadata import version

import litellm

name = json.load(urllib.request.urlopen(sys.argv[1] + "/v1/models"))["data"][0]["id"]
common = {"api_base": sys.argv[1] + "/v1", "api_key": "none", "model": "openai/" + name}
asked = {**common, "messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 8, "temperature": 0}
whole = litellm.completion(**asked)
text = whole.choices[0].message.content
assert whole.usage.completion_tokens >= 1, whole
chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
assert "".join(each.choices[0].delta.content or "" for each in chunks if each.choices) == text, chunks
later = asyncio.run(litellm.acompletion(**asked))
assert later.choices[0].message.content == text
schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
found = json.loads(litellm.completion(**asked | {"max_tokens": 40}, response_format=format).choices[0].message.content)
assert found["n"] in (1, 2)
old = litellm.text_completion(**common | {"model": "text-completion-openai/" + name}, prompt="One, two,", max_tokens=4)
assert old.choices[0].text
try:
    litellm.completion(**asked | {"model": "openai/nobody"})
    raise SystemExit("another model was not refused")
except litellm.NotFoundError as error:
    assert name in str(error)
print(json.dumps({"litellm": version("litellm"), "passed": True, "said": text}))
PYTHON
