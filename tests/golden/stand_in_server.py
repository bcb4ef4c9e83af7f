"""A stand-in for vLLM and SGLang: their HTTP API around transformers' own `generate`.

It answers as vLLM 0.32.0 does, as far as the client reads it; SGLang's answers differ in the fields
that `Dialect` names. `change` may spoil an answer.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = dict[str, Any]


class StandIn:
    """One model, painting greedily.

    Attributes:
        requests: bodies of the completions that were asked for.
        change: (path, answer) -> what is answered in its place: (HTTP status, bytes).
    """

    def __init__(self, folder: Path, owner: str = "vllm") -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.owner = owner
        self.requests: list[Answer] = []
        self.change: Callable[[str, Answer], tuple[int, bytes]] = as_it_is
        self._one_at_a_time = threading.Lock()

    def answer(self, path: str, body: Answer | None) -> Answer:
        if path == "/v1/models":
            longest = self.model.config.max_position_embeddings
            card = {"id": "painter", "owned_by": self.owner, "max_model_len": longest}
            return {"object": "list", "data": [card]}
        if path == "/version":
            return {"version": "0.32.0"}
        assert path == "/v1/completions", path
        assert body is not None
        self.requests.append(body)
        with self._one_at_a_time:
            ids = self._generated(body)
        text = self.tokenizer.decode(ids, skip_special_tokens=body["skip_special_tokens"])
        choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": "length"}
        return {"object": "text_completion", "choices": [choice]}

    def _generated(self, body: Answer) -> list[int]:
        assert body["temperature"] == 0, "this stand-in only paints greedily"
        prompt = torch.tensor([body["prompt"]])
        lifted = {(int(token),): bias for token, bias in body.get("logit_bias", {}).items()}
        allowed = body.get("allowed_token_ids")
        painted = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=body["max_tokens"],
            sequence_bias=lifted or None,
            prefix_allowed_tokens_fn=None if allowed is None else lambda row, ids: allowed,
        )
        return painted[0, prompt.shape[1] :].tolist()


def as_it_is(path: str, answer: Answer) -> tuple[int, bytes]:
    return 200, json.dumps(answer).encode()


@contextmanager
def serving(stand_in: StandIn) -> Iterator[str]:
    """Its address, while it runs."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, body: Answer | None) -> None:
            status, data = stand_in.change(self.path, stand_in.answer(self.path, body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._answer(None)

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, format: str, *args: Any) -> None:
            pass  # not into the test's output

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
