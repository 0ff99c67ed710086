"""What is served and how it does; embeddings and tokens; the pages."""

from __future__ import annotations

import base64
import re
import struct
from html.parser import HTMLParser

import msgspec
import pytest

from ringlm.cluster.messages import LinkStats, Recovering, Stats
from ringlm.frontend.tokenizer import Tokenizer
from tests.frontend.fake import FakeEngine
from tests.frontend.server.conftest import HI, Served


def stats(seconds: int = 0) -> Stats:
    """After so many seconds: a second has 4 steps and 10 tokens."""
    links = [LinkStats(1, 1000 * seconds, 2000 * seconds, 0.0002), LinkStats(2, 0, 0)]
    times = seconds * 1.5, seconds * 0.25, seconds * 1.25
    others = [(1, 2, 30 * seconds, 40 * seconds)]
    return Stats(1, 2, 100, 30, 20, 4 * seconds, 500, 60, 10 * seconds, 3, *times, links, others=others, at_s=seconds)


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
    assert (ring["state"], ring["reason"], ring["lost"]) == ("recovering", "rank 1 is lost.", 1)
    assert (ring["epoch"], ring["recoveries"]) == (0, 0)
    again = msgspec.structs.replace(engine.ready, epoch=3, recoveries=2, full_world_size=3)
    engine.recovering, engine.ready = None, again
    engine.stats = msgspec.structs.replace(stats(), spares=1, recoveries=2, slow={1: 4.5})
    ring = served.client.get("/v1/ring").json()
    assert (ring["state"], ring["lost"], ring["epoch"], ring["recoveries"]) == ("ready", None, 3, 2)
    assert ring["spares"] == 1
    assert (ring["world_size"], ring["full_world_size"]) == (2, 3)
    assert [rank["slow"] for rank in ring["ranks"]] == [None, 4.5]
    assert "ringlm_recoveries_total 2.0" in served.client.get("/metrics").text


def test_the_ring(served: Served, engine: FakeEngine) -> None:
    quiet = served.client.get("/v1/ring").json()
    assert quiet["ranks"][1] == {
        "rank": 1,
        "host": "",
        "device": "cpu",
        "threads": 1,
        "weights_bytes": 100,
        "peak_bytes": 200,
        "link": None,
        "slow": None,
    }
    assert (quiet["tokens_per_s"], quiet["cache"], quiet["step"], quiet["links"]) == (0, None, None, [])
    engine.stats = stats(1)
    served.client.get("/v1/ring")
    engine.stats = stats(3)
    busy = served.client.get("/v1/ring").json()
    assert busy["ranks"][1]["link"] == {
        "rank": 1,
        "sent_bytes": 3000,
        "received_bytes": 6000,
        "round_trip_s": 0.0002,
    }
    assert busy["tokens_per_s"] == 10
    assert busy["step"] == {"seconds": 0.375, "ring_s": 0.0625}
    assert busy["links"] == [
        {"ranks": [0, 1], "there_per_s": 1000, "back_per_s": 2000, "round_trip_s": 0.0002},
        {"ranks": [0, 2], "there_per_s": 0, "back_per_s": 0, "round_trip_s": None},
        {"ranks": [1, 2], "there_per_s": 30, "back_per_s": 40, "round_trip_s": None},
    ]
    assert busy["cache"] == {"blocks": 100, "in_use": 30, "cached": 20}
    assert busy["steps"] == {"count": 12, "seconds": 4.5, "ring_s": 0.75, "forward_s": 3.75}
    assert (busy["running"], busy["waiting"], busy["preemptions"]) == (1, 2, 3)
    engine.stats = msgspec.structs.replace(stats(2), at_s=4)  # in a ring that was formed again links count anew
    assert served.client.get("/v1/ring").json()["links"][0]["there_per_s"] == 0


def test_metrics(served: Served, engine: FakeEngine) -> None:
    engine.stats = stats(1)
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
        assert tag not in ("base", "iframe", "object")
        assert not any(name.startswith("on") or name == "style" for name, _ in attributes)
        self.found += [value or "" for name, value in attributes if name in ("href", "src")]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_need_nothing_from_elsewhere(served: Served, path: str) -> None:
    response = served.client.get(path)
    assert response.headers["content-type"].startswith("text/html")
    links = Links()
    links.feed(response.text)
    assert not [link for link in links.found if ":" in link and link != "data:,"]
    assert "default-src 'none'" in response.headers["content-security-policy"]
    for link in links.found:
        if not link.startswith(("#", "data:")):
            assert served.client.get(f"/{link}").status_code == 200
    if path == "/":
        modules = served.client.get("/page/app.js")
        assert modules.headers["content-type"].startswith("text/javascript")
        for name in re.findall(r'from "\./(\S+)"', modules.text):
            text = served.client.get(f"/page/{name}").raise_for_status().text
            assert not re.search("innerHTML|insertAdjacent|import\\(", text)
    else:
        assert "/v1/chat/completions" in response.text
        assert "ChatRequest" in response.text
