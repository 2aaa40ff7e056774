"""The benchmark of training reads Megatron's log and names what did not run."""

from benchmarks import train_128k

LOG = """
 iteration        1/       3 | elapsed time per iteration (ms): 9000.0 | throughput per GPU (TFLOP/s/GPU): 100.0 | learning rate: 2E-05 | lm loss: 1.2E+01 | loss scale: 1.0 |
[Rank 0] (after 1 iterations) memory (MB) | allocated: 1.0 | max allocated: 2048.0 | reserved: 4.0
 iteration        2/       3 | elapsed time per iteration (ms): 4000.0 | throughput per GPU (TFLOP/s/GPU): 400.0 | learning rate: 2E-05 | lm loss: 1.1E+01 | loss scale: 1.0 |
[Rank 0] (after 2 iterations) memory (MB) | allocated: 1.0 | max allocated: 1024.0 | reserved: 4.0
"""  # noqa: E501


def test_warm_up_is_left_out_and_memory_is_the_largest():
    figures = train_128k.read_log(LOG, 1, tokens_per_gpu=8000)
    assert figures == train_128k.Figures(4.0, 2000.0, 400.0, 2.0, [11.0])
    assert train_128k.read_log(LOG, 2, tokens_per_gpu=8000) is None


def test_ratio_is_of_the_best_arms():
    fast, slow = (train_128k.Figures(1, rate, 1, 1, []) for rate in (300.0, 200.0))
    found = {"ours_bf16": slow, "ours_fp8": fast, "stock_cp_full": slow}
    text = train_128k.report(found, {"stock_tp_full": "out of memory"})
    assert "ours_fp8 / stock_cp_full: 1.50" in text
    assert "| stock_tp_full | out of memory |" in text


def test_every_arm_fills_the_gpus():
    for gpus in (2, 4, 8):
        for flags in train_128k.arms(gpus).values():
            words = flags.split()
            sizes = [
                int(words[words.index(f"--{kind}-parallel-size") + 1])
                for kind in ("tensor-model", "context")
            ]
            assert sizes[0] * sizes[1] == gpus


def test_arms_of_four_gpus_differ_in_what_they_compare():
    """Ours and stock at TP2 CP2 differ in the loss alone, once the stock arm asks for FlashAttention."""
    arms = train_128k.arms(4)
    ours, stock = (
        arms[name].split() for name in ("ours_tp2_fp8", "stock_tp2_cp_selective_fp8_flash")
    )
    assert set(stock) - set(ours) == {"--megatron-loss", "--attention-backend", "flash"}
    assert set(ours) <= set(stock)
    for flag, size in (("--tensor-model-parallel-size", "2"), ("--context-parallel-size", "2")):
        assert ours[ours.index(flag) + 1] == size
    assert "ours_tp2_fp8" not in train_128k.arms(2)
