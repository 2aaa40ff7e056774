"""The command line: both directions, and errors of one paragraph with exit status 2."""

import pytest

TOOL = "tools/convert_checkpoint.py"


def test_both_ways(make_llama, run_job, read_weights, tmp_path):
    source = make_llama()
    ways = (
        ["hf-to-megatron", "--input", source, "--output", tmp_path / "ckpt"],
        ["megatron-to-hf", "--input", tmp_path / "ckpt", "--output", tmp_path / "hf"],
    )
    for way in ways:
        result = run_job(1, [TOOL, *way, "--verify"])
        assert result.stdout.startswith(f"wrote {way[-1]}: 21 tensors")
        assert "every bit equal" in result.stdout
    before, after = read_weights(source), read_weights(tmp_path / "hf")
    assert all(before[name].equal(after[name]) for name in before | after)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input", "nowhere", "--output", "out"], "error: --input nowhere does not exist"),
        (["--output", "out"], "the following arguments are required: --input"),
        (["--input", "a", "--output", "b", "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_errors_of_the_user(run_job, flags, message):
    result = run_job(1, [TOOL, "hf-to-megatron", *flags], check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
