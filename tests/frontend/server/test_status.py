"""What is served and how it does; embeddings and tokens; the pages."""

from __future__ import annotations

import base64
import struct
import time
from html.parser import HTMLParser

import msgspec
import pytest

from ringlm.cluster.messages import LinkStats, Recovering, Stats
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import FakeEngine
from tests.frontend.server.conftest import HI, Served


def stats(generated: int = 0) -> Stats:
    links = [LinkStats(1, 1000, 2000, 0.0002)]
    return Stats(1, 2, 100, 30, 20, 7, 500, 60, generated, 3, 1.5, 0.25, 1.25, links)


def test_models(served: Served) -> None:
    answer = served.client.get("/v1/models").json()
    assert answer["object"] == "list"
    assert [each["id"] for each in answer["data"]] == ["fake", "alias/x"]
    assert served.client.get("/v1/models/alias/x").json() == answer["data"][1]
    assert answer["data"][0]["max_model_len"] == 2048


def test_health(served: Served) -> None:
    response = served.client.get("/health")
    well = {"status": "ok", "world_size": 2, "rank": None, "reason": None}
    assert (response.status_code, response.json()) == (200, well)


def test_a_ring_that_is_formed_again(served: Served, engine: FakeEngine) -> None:
    engine.recovering = Recovering(1, "rank 1 is lost.")
    response = served.client.get("/health")
    degraded = {"status": "degraded", "world_size": 2, "rank": 1, "reason": "rank 1 is lost."}
    assert (response.status_code, response.json()) == (503, degraded)
    ring = served.client.get("/v1/ring").json()
    assert (ring["state"], ring["reason"], ring["epoch"], ring["recoveries"]) == ("recovering", "rank 1 is lost.", 0, 0)
    engine.recovering, engine.ready = None, msgspec.structs.replace(engine.ready, epoch=3, recoveries=2)
    engine.stats = msgspec.structs.replace(stats(), spares=1, recoveries=2, slow={1: 4.5})
    ring = served.client.get("/v1/ring").json()
    assert (ring["state"], ring["epoch"], ring["recoveries"], ring["spares"]) == ("ready", 3, 2, 1)
    assert [rank["slow"] for rank in ring["ranks"]] == [None, 4.5]
    assert "ringlm_recoveries_total 2.0" in served.client.get("/metrics").text


def test_the_ring(served: Served, engine: FakeEngine) -> None:
    quiet = served.client.get("/v1/ring").json()
    assert quiet["ranks"][1] == {
        "rank": 1,
        "device": "cpu",
        "threads": 1,
        "weights_bytes": 100,
        "peak_bytes": 200,
        "link": None,
        "slow": None,
    }
    assert (quiet["tokens_per_s"], quiet["cache"]) == (0, None)
    engine.stats = stats(10)
    served.client.get("/v1/ring")
    time.sleep(0.05)
    engine.stats = stats(20)
    busy = served.client.get("/v1/ring").json()
    assert busy["ranks"][1]["link"] == {
        "rank": 1,
        "sent_bytes": 1000,
        "received_bytes": 2000,
        "round_trip_s": 0.0002,
    }
    assert 0 < busy["tokens_per_s"] <= 10 / 0.05
    assert busy["cache"] == {"blocks": 100, "in_use": 30, "cached": 20}
    assert busy["steps"] == {"count": 7, "seconds": 1.5, "ring_s": 0.25, "forward_s": 1.25}
    assert (busy["running"], busy["waiting"], busy["preemptions"]) == (1, 2, 3)


def test_metrics(served: Served, engine: FakeEngine) -> None:
    engine.stats = stats()
    served.post("/v1/chat/completions", messages=HI)
    served.post("/v1/completions", prompt="Once", best_of=2)
    response = served.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'ringlm_requests_total{finish_reason="stop"} 2' in response.text
    assert "ringlm_time_to_first_token_seconds_count 1" in response.text
    assert 'ringlm_link_bytes_total{direction="sent",rank="1"} 1000' in response.text


@pytest.mark.parametrize("given", ["Once", ["Once", "upon"], [5, 6], [[5, 6], [7]]])
def test_embeddings(served: Served, tokenizer: Tokenizer, given: list[object]) -> None:
    several = isinstance(given, list) and not isinstance(given[0], int)
    tokens = [tokenizer.encode(each) if isinstance(each, str) else each for each in (given if several else [given])]
    answer = served.post("/v1/embeddings", input=given)
    assert answer["object"] == "list"
    assert answer["data"] == [
        {"object": "embedding", "index": index, "embedding": [float(token) for token in each]}
        for index, each in enumerate(tokens)
    ]
    count = sum(map(len, tokens))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    coded = served.post("/v1/embeddings", input=given, encoding_format="base64")
    for index, each in enumerate(tokens):
        data = base64.b64decode(coded["data"][index]["embedding"])
        assert struct.unpack(f"<{len(each)}f", data) == tuple(each)


def test_tokens_and_back(served: Served, tokenizer: Tokenizer) -> None:
    answer = served.post("/tokenize", prompt="Once upon")
    tokens = tokenizer.encode("Once upon")
    assert answer == {"count": len(tokens), "max_model_len": 2048, "tokens": tokens}
    assert served.post("/detokenize", tokens=tokens) == {"prompt": "Once upon"}
    assert served.post("/tokenize", messages=HI)["tokens"] == tokenizer.chat(HI)


class Links(HTMLParser):
    """Everything a page would load or point at."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        self.found += [value or "" for name, value in attributes if name in ("href", "src")]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_need_nothing_from_elsewhere(served: Served, path: str) -> None:
    response = served.client.get(path)
    assert response.headers["content-type"].startswith("text/html")
    links = Links()
    links.feed(response.text)
    assert not [link for link in links.found if ":" in link and link != "data:,"]
    for link in links.found:
        if not link.startswith(("#", "data:")):
            assert served.client.get(f"/{link}").status_code == 200
    if path == "/docs":
        assert "/v1/chat/completions" in response.text
        assert "ChatRequest" in response.text
