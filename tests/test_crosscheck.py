"""The helpers' speeds beside vLLM's own benchmarks, with the real engine, small enough for every run."""

from types import SimpleNamespace

import pytest

from helpers import crosscheck, measure

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
def test_in_one_engine_the_two_clocks_agree(pairs):
    turns = pairs[0]
    print(f"generate: ours {turns.ours_s:.2f} s, vLLM's {turns.theirs_s:.2f} s, {turns.ratio:.3f}")
    assert (turns.bench, turns.batch, turns.output_tokens) == ("generate", 4, 32)
    assert 1 / TURNS < turns.ratio < TURNS


@pytest.mark.slow
def test_a_batch_takes_what_its_speed_says(pairs):
    latency = pairs[1]
    print(f"latency: ours {latency.ours_s:.2f} s, vLLM's {latency.theirs_s:.2f} s, {latency.ratio:.3f}")
    assert (latency.bench, latency.batch, latency.output_tokens) == ("latency", 4, 32)
    assert 1 / MOST < latency.ratio < MOST


@pytest.mark.slow
def test_a_queue_takes_what_its_speed_says(pairs):
    throughput = pairs[2]
    print(
        f"throughput: ours {throughput.ours_s:.2f} s, vLLM's {throughput.theirs_s:.2f} s, "
        f"{throughput.ratio:.3f}"
    )
    assert throughput.bench == "throughput"
    assert 1 / MOST < throughput.ratio < MOST


def test_the_seconds_that_follow_from_a_speed():
    speed = measure.Speed(4, 100.0, 90.0, 110.0, 0.5, 3, 32)  # 4 requests at 25 tokens/s each
    assert crosscheck.expected(speed, 26) == pytest.approx(0.5 + 25 / 25)
    assert crosscheck.Pair("latency", 4, 32, 26, 1.5, 1.2).ratio == pytest.approx(1.25)


@pytest.mark.slow
def test_a_benchmark_that_fails_says_why(tmp_path):
    engine = SimpleNamespace(args={"model": str(tmp_path / "nothing-here")}, in_process=True)
    with pytest.raises(crosscheck.CrossCheckError, match="vllm bench latency failed") as raised:
        crosscheck.bench(engine, "latency", 1, 4, 4, 1, tmp_path)
    assert "nothing-here" in str(raised.value)
