"""The helpers' speeds beside vLLM's own benchmarks, with the real engine, small enough for every run."""

from types import SimpleNamespace

import pytest

from helpers.measure.speed import Speed
from helpers.tools import crosscheck
from helpers.tools.crosscheck import CrossCheckError, Pair

# Two cores that others may use as well differ by more from one minute to the next than the two ways of
# measuring do; on a quiet machine the seconds agree within a few percent (the test prints them).
MOST = 1.5
TURNS = 1.2  # of runs that took turns in one engine


@pytest.fixture(scope="module")
def pairs(warm, tmp_path_factory):  # warm: the first engine of a process is told from the others
    folder = tmp_path_factory.mktemp("crosscheck")
    return list(
        crosscheck.check(
            "embedded",
            batches=[4],
            prompt_tokens=32,
            output_tokens=32,
            turns=3,
            repeats=3,
            log_dir=folder,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "bench", "most"), [(0, "generate", TURNS), (1, "latency", MOST), (2, "throughput", MOST)]
)
def test_a_batch_takes_what_its_speed_says(pairs, number, bench, most):
    pair = pairs[number]
    print(f"{bench}: ours {pair.ours_s:.2f} s, vLLM's {pair.theirs_s:.2f} s, {pair.ratio:.3f}")
    assert (pair.bench, pair.batch, pair.output_tokens) == (bench, 4, 32)
    assert 1 / most < pair.ratio < most


def test_the_seconds_that_follow_from_a_speed():
    speed = Speed(4, 100.0, 90.0, 110.0, 0.5, 3, 32)  # 4 requests at 25 tokens/s each
    assert crosscheck.expected(speed, 26) == pytest.approx(0.5 + 25 / 25)
    assert Pair("latency", 4, 32, 26, 1.5, 1.2).ratio == pytest.approx(1.25)


@pytest.mark.slow
def test_a_benchmark_that_fails_says_why(tmp_path):
    engine = SimpleNamespace(args={"model": str(tmp_path / "nothing-here")}, in_process=True)
    with pytest.raises(CrossCheckError, match="vllm bench latency failed") as raised:
        crosscheck.bench(engine, "latency", 1, 4, 4, 1, tmp_path)
    assert "nothing-here" in str(raised.value)
