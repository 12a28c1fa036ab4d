"""The answer: which way to deploy a model, what would overrule it, and the command that gives it."""

import itertools
import json
import os
import resource
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest

from helpers import advise as command
from helpers.base.files import ROOT
from helpers.base.parameters import ParameterError
from helpers.compare import advise, counting, options
from helpers.compare.cards import CARDS
from helpers.compare.sizing import UTILIZATION, Load
from helpers.model import lookup, shapes
from helpers.model.layout import LayoutError
from helpers.model.model import ModelError
from helpers.serve import settings
from helpers.tools import card
from tests.hub import hub


def asked(*arguments: str, capsys) -> tuple[int, str, str]:
    code = command.main(list(arguments))
    return code, *capsys.readouterr()


def by_scheme(answer: advise.Advice) -> dict[str, options.Option]:
    return {one.scheme: one for one in answer.options}


def test_an_8b_on_an_l4_takes_eight_bits_and_an_fp8_cache():
    answer = advise.advise("Qwen/Qwen3-8B", "L4", users=20)
    found = by_scheme(answer)
    assert answer.chosen.scheme == "fp8_fp8_kv"
    assert [found[n].fits for n in ("baseline", "fp8", "fp8_fp8_kv", "awq")] == [False, False, True, True]
    assert 0 < found["baseline"].users < 20 < found["fp8_fp8_kv"].users
    assert found["baseline"].needs == 2
    assert found["baseline on 2 GPUs"].fits
    assert answer.chosen.command == (
        "vllm serve Qwen/Qwen3-8B --quantization fp8_per_channel --kv-cache-dtype fp8 --max-model-len 4096"
    )
    assert "16 bits give 280 on 2 GPUs" in answer.sentence
    assert answer.table().columns[3:5] == ["tokens/s", "gain a GPU (16 bits on 2 GPUs = 1)"]
    assert not any("AWQ" in why and "gives" in why for why in answer.overruled_by), "prompts are arithmetic"
    cached = advise.advise("qwen3-8b", "L4", users=20, prompts=0)
    assert any("AWQ weights, FP8 KV cache gives" in why for why in cached.overruled_by)


def test_a_goal_decides_and_a_difference_within_the_margin_does_not():
    load = Load(CARDS["L4"], users=20)
    found = advise.advise("qwen3-8b", "L4", users=20, prompts=0).options
    chosen = {goal: options.recommended(found, goal, load).scheme for goal in advise.GOALS}
    assert chosen["latency"].startswith("awq")
    assert chosen["quality"] == "fp8_fp8_kv", "the least rounding that holds the load"
    best = {one.scheme: one.per_s for one in found}
    ratio = best["awq_fp8_kv"] / best["fp8_fp8_kv"]
    assert 1 < ratio < options.MORE
    assert chosen["throughput"] == "fp8_fp8_kv", "what rounds more must give MORE times as much"


def test_prompts_are_arithmetic_which_four_bits_do_not_save():
    """Of a 70B on H100s AWQ on one writes most, and FP8 on two reads so much faster that it gives more."""
    asked = [advise.advise("llama-3.1-70b", "H100", gpus=2, prompts=prompts) for prompts in (0, 8)]
    assert [answer.chosen.scheme.startswith("awq") for answer in asked] == [True, False]
    assert asked[1].chosen.scheme.startswith("fp8")
    assert any("prompts are short" in why and "AWQ" in why for why in asked[1].overruled_by)
    with pytest.raises(ParameterError, match="prompts must be a number from 0 to 10000"):
        advise.advise("qwen3-8b", prompts=-1)


@pytest.mark.parametrize(
    ("model", "gpu", "asked", "wanted"),
    [
        ("qwen3-8b", "H200", {"context": 1024, "users": 400}, {"max_num_seqs": 400, "quantization": "fp8"}),
        ("qwen3-8b", "H200", {"goal": "quality"}, {"quantization": "none"}),
        ("qwen3-8b", "L4", {}, {"max_num_seqs": 35, "quantization": "fp8", "model_name": "Qwen/Qwen3-8B"}),
        ("llama-3.1-70b", "L40S", {"gpus": 4}, {"tensor_parallel_size": 2}),
        ("qwen3-8b", "T4", {"users": 1, "goal": "latency"}, {"model_name": "Qwen/Qwen3-8B-AWQ"}),
    ],
)
def test_the_choice_is_served_by_the_command_and_by_the_lines_of_a_dotenv_file(
    model, gpu, asked, wanted, tmp_path, capsys
):
    answer = advise.advise(model, gpu, **asked)
    (tmp_path / ".env").write_text(answer.environment)
    with warnings.catch_warnings(action="error"):
        found = settings.load(tmp_path / ".env").model_dump()
    wanted |= {"max_model_len": answer.load.context, "gpu_memory_utilization": UTILIZATION}
    assert {name: found[name] for name in wanted} == wanted
    flags = answer.chosen.command.split()
    assert ("--max-num-seqs" in flags) == (found["max_num_seqs"] > options.MOST_AT_ONCE)
    for line in answer.environment.splitlines():
        if "command: " in line:
            assert set(json.loads(line.partition("command: ")[2])) <= set(flags)
    command.main([model, "--gpu", gpu])
    assert "    MODEL_NAME=" in capsys.readouterr().out


@pytest.mark.parametrize("gpu", ["L4", "A10", "L40S", "H100 SXM"])
def test_with_more_users_no_way_comes_back_that_was_left(gpu):
    found = [advise.advise("qwen3-8b", gpu, users=users).chosen.scheme for users in range(1, 25)]
    assert len([way for way, _ in itertools.groupby(found)]) == len({*found})


def test_a_70b_is_quantized_or_gets_more_gpus():
    found = by_scheme(advise.advise("llama-3.1-70b", "H200", context=2048))
    assert (found["baseline"].fits, found["baseline"].needs) == (False, 2)
    assert found["fp8"].fits
    assert found["baseline on 2 GPUs"].command.endswith("--tensor-parallel-size 2")
    # Measured once: eight bits on one H200 give 48.5 tokens/s at batch 1, sixteen on two 47.0. Estimates of
    # several GPUs leaves out what they tell each other, and is further above.
    assert found["fp8"].rate(1) == pytest.approx(48.5, rel=0.1)
    assert 1 < found["baseline on 2 GPUs"].rate(1) / 47.0 < 1.25
    assert "add --data-parallel-size 2" in advise.advise("llama-3.1-70b", "H200", gpus=2).sentence


def test_a_checkpoint_that_is_quantized_is_served_as_it_is():
    answer = advise.advise("openai/gpt-oss-20b", "RTX 4090", users=4)
    assert answer.chosen.scheme in ("as_it_is", "as_it_is_fp8_kv")
    assert answer.as_json()["as_it_is"] == {"weights_bytes": 13_761_264_768}
    assert "--quantization" not in answer.chosen.command


def test_nothing_fits_is_said_with_what_would():
    answer = advise.advise("llama-3.1-70b", "T4")
    assert answer.chosen is None
    assert answer.sentence.startswith("Nothing serves this model on 1 x T4")
    assert answer.as_json()["refused"] == answer.sentence
    assert "CUDA 13" in advise.advise("phi-2", "V100").sentence


def test_some_wait_where_not_all_fit():
    answer = advise.advise("qwen3-8b", "T4", users=64)
    assert 0 < answer.chosen.users < 64
    assert f"{answer.chosen.users} of 64 run at once, the others wait" in answer.sentence


@pytest.mark.parametrize("model", shapes.CONFIGS)
def test_every_estimate_keeps_its_order(model):
    """More memory never holds fewer users, fewer bits never more bytes."""
    held = [by_scheme(advise.advise(model, name)) for name in ("L4", "L40S", "H100 SXM", "H200")]
    for less, more in pairwise(held):
        assert all(less[name].users <= more[name].users or more[name].gpus < less[name].gpus
                   for name in less if name in more)  # fmt: skip
    found = [one for one in held[0].values() if one.step and one.gpus == 1]
    for one in found:
        assert one.budget.spare >= 0 or not one.fits
        assert one.per_s >= one.rate(1) * 0.9


def test_what_is_on_record_stands_before_an_estimate():
    found = {gpu: by_scheme(advise.advise("qwen3-8b", gpu))["fp8"].alone for gpu in ("H200", "L4")}
    assert found["H200"].source == "recorded on an H200, 1024 tokens in"
    assert found["L4"].source == options.ESTIMATE
    ways = by_scheme(advise.advise("qwen3-8b", "H200", users=20))
    assert ways["fp8"].together.source.startswith("recorded")
    for way in ways.values():  # and what is shown, paid and compared is that, too
        assert way.per_s / ways["baseline"].per_s == pytest.approx(way.together.ratio)
        assert way.one_per_s / ways["baseline"].one_per_s == pytest.approx(way.alone.ratio)


def test_a_geforce_multiplies_integers_at_twice_the_rate_of_fp8():
    ways = by_scheme(advise.advise("qwen3-8b", "RTX 4090", users=32))
    assert ways["fp8"].reading_s == pytest.approx(2 * ways["int8"].reading_s)
    assert CARDS["RTX 5090"].rate(4) == 4 * CARDS["RTX 5090"].rate(8)


# -- the command --------------------------------------------------------------------------------------------


def test_the_command_needs_a_config_alone_and_no_vllm(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(shapes.CONFIGS["qwen3-30b-a3b"]))
    code = (
        "import sys, json\nfrom helpers import advise\n"
        f"code = advise.main([{str(tmp_path)!r}, '--gpu', 'L40S', '--json'])\n"
        "assert not any(name.split('.')[0] == 'vllm' for name in sys.modules)\nsys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=True
    )
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10, "seconds"
    found = json.loads(done.stdout)
    assert set(found) == {"model", "as_it_is", "kv_bytes_per_token", "ways", "recommended", "refused"}
    assert found["as_it_is"] is None
    assert found["kv_bytes_per_token"] == 98_304
    ways = {way["scheme"]: way for way in found["ways"]}
    assert ways["baseline"]["weights_bytes"] == 61_064_245_248
    assert ways["fp8"]["weights_bytes"] == pytest.approx(31.26e9, rel=0.001)
    assert ways["awq"]["weights_bytes"] == pytest.approx(16.8e9, rel=0.001)
    assert found["recommended"] in ways
    names = {"scheme", "weights_bytes", "fits", "users", "gain", "command", "refused"}
    assert all(names <= set(way) for way in ways.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qwen3-8b", "--gpu", "Voodoo 2"], "No data sheet of 'Voodoo 2' is here. There are: T4"),
        (["qwen3-8b", "--gpus", "0"], "gpus must be a whole number from 1 to 8"),
        (["qwen3-8b", "--users", "-3"], "users must be a whole number from 1 to"),
        (["qwen3-8b", "--price", "-1"], "price, in dollars a day, must be a number from 0.01 to"),
        (["qwen3-8b", "--goal", "fame"], "goal must be one of fit, latency, throughput, quality"),
        (["no-such-shape"], "There is no folder 'no-such-shape', and no shape of that name"),
        (["{folder}"], "has no config.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_that_names_what_is_allowed(arguments, said, tmp_path, capsys):
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    code, out, error = asked(*arguments, capsys=capsys)
    assert (code, out) == (2, "")
    assert said in error
    assert error.count("\n") == 1
    code, out, _ = asked(*arguments, "--json", capsys=capsys)
    assert code == 2
    assert said in json.loads(out)["refused"]
    assert list(json.loads(out)) == ["refused"]


@pytest.mark.parametrize(
    "text", ['{"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"]}', "{", "[]", '{"a": 1}']
)
def test_a_config_that_cannot_be_counted_is_refused_from_every_entry_point(text, tmp_path, capsys):
    (tmp_path / "config.json").write_text(text)
    code, out, _ = asked(str(tmp_path), "--json", capsys=capsys)
    assert code == 2
    assert list(json.loads(out)) == ["refused"]
    with pytest.raises((ModelError, LayoutError)):
        counting.counted(lookup.sized(str(tmp_path)))


def test_a_context_longer_than_the_models_is_its_own(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert advise.advise(str(tmp_path)).load.context == 1024
    assert advise.advise(str(tmp_path), context=4096).load.context == 1024


def test_a_hub_name_fetches_its_config_and_nothing_else(tmp_path):
    files = {
        "config.json": json.dumps(shapes.CONFIGS["qwen3-8b"]).encode(),
        "model-00001-of-00001.safetensors": b"weights" * 1000,
    }
    code = "from helpers import advise\nimport sys\nsys.exit(advise.main(['owner/model', '--json']))"
    with hub(files) as address:
        environ = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kv_bytes_per_token"] == 147_456
    fetched = [path.name for path in tmp_path.rglob("*") if path.name in files]
    assert set(fetched) == {"config.json"}


@pytest.mark.slow
def test_vllm_itself_understands_every_line():
    asked = {"qwen3-8b": "L4", "gpt-oss-20b": "B200", "llama-3.1-70b": "H100", "phi-2": "T4"}
    found = [one for model, card in asked.items() for one in advise.advise(model, card).options]
    lines = {one.command for one in found if one.command}
    code = (
        "import shlex, sys\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "for line in sys.stdin:\n"
        "    args = make_arg_parser(FlexibleArgumentParser()).parse_args(shlex.split(line)[2:])\n"
        "    validate_parsed_serve_args(args)\n"
        "    assert args.model_tag == shlex.split(line)[2], line\n"
    )
    assert len(lines) > 20
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(lines), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# -- what a reader sees -------------------------------------------------------------------------------------


def test_a_table_has_at_most_seven_columns_and_twelve_rows():
    for gpu in ("T4", "L4", "B200"):
        table = advise.advise("qwen3-8b", gpu, users=20, price=10.8).table()
        assert len(table.columns) <= 7
        assert len(table.rows) <= 12


def test_any_model_is_accepted_by_the_widget(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # its client tries six times, 23 s
    (tmp_path / "config.json").write_text(json.dumps(shapes.CONFIGS["qwen3-8b"]))
    for model in (str(tmp_path), "Qwen/Qwen3-8B", "shape:qwen3-8b", "qwen3-8b", "no/such-model-anywhere"):
        shown = advise.explorer(model, "L4", 4096, 20, "throughput")
        assert shown.live().children
        assert repr(shown)


def test_readmes_card_is_the_one_that_is_computed():
    page = (ROOT / "README.md").read_text()
    assert card.written(page) == page, "make card writes it anew"


def test_the_answer_says_the_same_in_text_and_on_a_page():
    answer = advise.advise("qwen3-8b", "L4", users=20, price=10.8)
    page = answer._repr_html_()
    text = " ".join(repr(answer).split())  # its lines are wrapped
    for said in (answer.chosen.command, answer.overruled_by[0]):
        assert said in text
        assert said in page
    assert "$0." in answer.sentence


@pytest.mark.parametrize("gpu", ["T4", "L4", "A100 80GB", "H100 SXM"])
@pytest.mark.parametrize("users", [1, 20, 64, 256])
def test_no_other_way_is_both_faster_and_gentler(gpu, users):
    found = advise.advise("qwen3-8b", gpu, users=users)
    one = found.chosen
    others = [o for o in found.options if o.users and o.gpus == one.gpus and o.fits >= one.fits]
    assert len(others) > 2
    assert not [o.scheme for o in others if o.kept.loss < one.kept.loss and o.per_s > one.per_s]


def test_to_fit_is_to_hold_all_with_the_least_rounding_or_else_most():
    assert advise.advise("qwen3-32b", "H100 SXM", users=64, goal="fit").chosen.scheme == "fp8_fp8_kv"
    assert advise.advise("qwen3-8b", "A10", users=64, goal="fit").chosen.scheme == "awq_fp8_kv"


def test_one_users_speed_is_offered_on_more_gpus_where_a_record_says_what_they_tell_each_other():
    def why(name, gpu, gpus):
        return " ".join(advise.advise(name, gpu, gpus=gpus, users=4).overruled_by)

    assert "--tensor-parallel-size 4 should give" in why("llama-3.1-70b", "H200", 4)
    assert "--tensor-parallel-size" not in why("qwen3-8b", "H200", 1)
    assert "--tensor-parallel-size" not in why("qwen3-8b", "L4", 2), "nothing is on record over PCIe"


def test_of_a_mixture_of_experts_nothing_is_said_that_was_recorded_of_dense_models():
    found = advise.advise("qwen3-30b-a3b", "H200", gpus=2, users=1)
    assert "--tensor-parallel-size" not in str(found)
    assert "A mixture of experts is estimated" in str(found)
    assert "A mixture of experts" not in str(advise.advise("qwen3-8b", "H200", users=1))
