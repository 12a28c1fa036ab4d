"""Several servers, without any: prompts for a router, the queue's arithmetic, recordings of two GPUs."""

import json
from types import SimpleNamespace

import pytest

from helpers.base import records
from helpers.compare import parallel_tables
from helpers.model import lookup
from helpers.model.model import EMBEDDED
from helpers.serve import clients, prompts, scale_tables
from helpers.serve.queue import Queue, overshoot
from helpers.tools import extras, scale
from tests.nginx import Upstream

CPU_BLOCK = 128  # tokens of a block of vLLM's cache on a CPU


@pytest.fixture(scope="module")
def tokens():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(lookup.resolve(EMBEDDED).folder / "tokenizer.json"))
    return lambda request: tokenizer.encode(request.body["messages"][0]["content"]).ids


def in_common(one: list[int], other: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def test_what_is_shared_is_longer_than_a_block_and_what_is_distinct_is_not(tokens):
    alike = [tokens(request) for request in prompts.shared(3)]
    apart = [tokens(request) for request in prompts.distinct(3) + prompts.shared(1)]
    assert all(in_common(alike[0], other) > CPU_BLOCK for other in alike[1:])
    assert all(in_common(one, other) < CPU_BLOCK / 4 for one in apart for other in apart if one is not other)


def test_a_turn_of_a_session_begins_with_the_one_before_and_says_whose_it_is(tokens):
    asked = prompts.sessions(users=5, turns=3)
    names = [request.headers["X-Session-ID"] for request in asked]
    assert names[:5] == names[5:10] == names[10:]
    assert len(set(names)) == 5
    first, second = tokens(asked[0]), tokens(asked[5])
    assert in_common(first, second) >= len(first) - 2 > CPU_BLOCK
    assert in_common(first, tokens(asked[1])) < CPU_BLOCK / 4


def test_a_queue_grows_by_what_is_not_answered_until_another_is_up():
    assert overshoot(arrivals=10.0, capacity=6.0, start_s=30.0) == 120
    assert overshoot(arrivals=5.0, capacity=6.0, start_s=30.0) == 0


def test_what_happened_to_a_queue_is_named_apart_and_inside_the_frame():
    queue = SimpleNamespace(seconds=[1.0, 40.0, 80.0], waiting=[0.0, 300.0, 0.0])
    marks = {"killed": 4.0, "rule": 4.5, "new one": 79.0, "load ended": 42.0}
    shown = scale_tables.waiting(queue, marks, 187.0)
    assert "new one after ‹79 s›, load ended after ‹42 s›; at most ‹300›, predicted ‹187›" in shown.alt
    shown.figure.draw_without_rendering()
    [axes] = shown.figure.axes
    frame, boxes = axes.get_window_extent(), [text.get_window_extent() for text in axes.texts]
    assert all(frame.x0 < box.x0 and box.x1 < frame.x1 and box.y1 < frame.y1 for box in boxes)
    assert not [1 for at, one in enumerate(boxes) for other in boxes[:at] if one.overlaps(other)]


def test_a_queue_that_never_grows_is_told_so():
    router = SimpleNamespace(metrics=lambda: {"vllm:num_requests_waiting": 3.0})
    with Queue(router, every_s=0.01) as queue:
        assert queue.wait_until_longer(than=2) < 5
        before = queue.now()
        assert queue.wait_until_longer(than=3, timeout_s=0.2) >= before + 0.2


# ---- streams


def piece(text: str, reason: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": reason}]})


WHOLE = [
    piece("Red"),
    piece(" blue", "length"),
    '{"choices": [], "usage": {"completion_tokens": 2}}',
    "[DONE]",
]


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (WHOLE, "answered"),
        (WHOLE[:1], "cut off"),  # as vllm-router ends a stream whose server died: like a whole one
        ([piece("Red"), piece("", "abort"), *WHOLE[2:]], "aborted"),
        ([WHOLE[1], '{"choices": [], "usage": {"completion_tokens": 1}}', "[DONE]"], "wrong"),
    ],
)
def test_a_stream_is_whole_only_if_its_end_came(said, outcome):
    with Upstream() as listener:
        listener.says = "".join(f"data: {line}\n\n" for line in said)
        server = SimpleNamespace(url=f"http://127.0.0.1:{listener.server_port}", headers={}, name="m")
        with clients.crowd(server, clients.streamed(clients.long(1, 2)), 1) as crowd:
            (found,) = crowd.outcomes()
    assert (found.how, found.status) == (outcome, 200)
    assert found.text.startswith("Red") or outcome == "wrong"


# ---- recordings


LOADS = records.recorded(records.REFERENCE, "scale.jsonl", ("what",))[0]
BOTH = [*records.deployments(), *records.parallel()]


def rates(way: str, count: int, model: str = parallel_tables.SMALL) -> list[float]:
    return [
        row["requests_per_s"]
        for row in LOADS
        if (row["what"], row.get("way"), row.get("clients"), row.get("model")) == ("load", way, count, model)
    ]


def test_what_the_lesson_says_of_two_gpus_is_on_record():
    assert min(rates("router", 256)) > 1.9 * max(rates("one", 256))
    assert min(rates("router", 256)) > 1.3 * max(rates("tensor parallel", 256))
    assert max(rates("data parallel", 512)) < 0.65 * min(rates("router", 512))
    assert max(rates("tensor parallel", 512)) < 0.65 * min(rates("router", 512))
    assert all(len(rates(way, 256)) >= 3 for way in parallel_tables.LOOKS)
    large = "Llama-3.1-70B"
    assert min(rates("router", 64, large)) > 1.4 * max(rates("tensor parallel", 64, large))
    (kill,) = [row for row in LOADS if row["what"] == "kill"]
    assert kill["answered"] == 12 * kill["clients"]
    endings = [row for row in LOADS if row["what"] in ("ending", "memory")]
    assert {row["how"] for row in endings if "how" in row} == set(scale.ENDINGS)
    for ending in endings:
        assert ending["left"] == 0
        assert ending["after_bytes"] == ending["before_bytes"]


def test_recorded_loads_are_medians_with_their_range():
    table = parallel_tables.served(LOADS)
    found = dict(zip(table.columns, next(row for row in table.rows if "router" in row[0]), strict=True))
    seen = rates("router", 256)
    assert len(seen) == 3
    assert found["requests/s, 256 clients"] == f"{sorted(seen)[1]:.3g} ({min(seen):.3g} to {max(seen):.3g})"
    alone = next(row for row in table.rows if row[0] == "one server, one GPU")
    assert alone[-1] == "-"  # it was not asked by 512
    figure = parallel_tables.ways(LOADS)
    tokens = 128 * sorted(seen)[1] / 2
    assert f" and {tokens:,.0f} at 256 clients" in figure.alt


def test_a_model_that_outgrows_a_gpu_is_compared_by_what_a_gpu_gives():
    rows = {(row[0], row[1]): row[2:] for row in parallel_tables.outgrown(BOTH).rows}
    fp8, sixteen = rows["FP8", 1], rows["16 bits", 2]
    assert ("16 bits", 1) not in rows
    assert float(fp8[2]) == pytest.approx(float(sixteen[2]), rel=0.05)  # one user
    assert float(fp8[-1].replace(",", "")) > 1.8 * float(sixteen[-1].replace(",", ""))
    assert float(rows["FP8", 2][1].replace(",", "")) > 3 * float(fp8[1].replace(",", ""))


def test_fewer_bits_gain_less_where_two_gpus_share_the_reading():
    shown = [
        row for row in parallel_tables.spread(BOTH).rows if row[0] == "Mistral-7B" and row[1] != "16 bits"
    ]
    assert len(shown) == 2
    for row in shown:
        assert float(row[-1]) < float(row[-2])


# ---- the packages


def test_a_set_up_that_cannot_have_the_packages_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(extras, "lock_of", lambda group: tmp_path / f"{group}.lock")
    (tmp_path / "some.lock").write_text(f"ray==0.0.1 --hash=sha256:{64 * '0'}\n")
    with pytest.raises(
        extras.SetupError, match=r"Installing some.lock failed:(.|\n)*ray(.|\n)*PIP_FIND_LINKS"
    ):
        extras.ensure("some")
