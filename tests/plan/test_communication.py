"""What several GPUs exchange: against sums by hand."""

from dataclasses import replace

import pytest

from vmae_fast import VideoMAE, VideoMAEConfig
from vmae_fast.plan import Gpu, Links, Settings, StepTime, find_gpu, make_plan
from vmae_fast.plan.communication import BUCKET_BYTES, copied_bytes, exchange_of
from vmae_fast.plan.gpus import GPUS, LINK_SHARE, LINKS
from vmae_fast.plan.memory import memory_parts, state_parts
from vmae_fast.plan.text import describe
from vmae_fast.plan.units import Unit, units_of

TINY = VideoMAEConfig.of("tiny", frames=4, image_size=32)


def settings(gpus, parallel, **more):
    return Settings(TINY, 2, gpus, parallel=parallel, **more)


# ---- parts of the model -------------------------------------------------------------------


def test_units_hold_all_weights_once():
    model = VideoMAE(TINY)
    units = units_of(TINY)
    assert units.values == sum(p.numel() for p in model.parameters())
    assert len(units.blocks) == len(model.encoder.blocks) + len(model.decoder.blocks)
    for unit, block in zip(units.blocks, [*model.encoder.blocks, *model.decoder.blocks],
                           strict=True):  # fmt: skip
        assert unit.shard(1) == sum(p.numel() for p in block.parameters())


def test_rows_are_not_divided():
    # 5 rows of 3 among 4: two each, the last GPU has none; one row among 4: one each.
    unit = Unit(((5, 3), (1, 7)))
    assert [unit.shard(gpus) for gpus in (1, 2, 4, 5)] == [22, 9 + 7, 6 + 7, 3 + 7]


# ---- volume -------------------------------------------------------------------------------


def test_gradients_of_ddp_by_hand():
    values = sum(p.numel() for p in VideoMAE(TINY).parameters())
    links = Links.of(find_gpu("a100"))
    for gpus in (2, 4, 16):
        for accumulate in (1, 3):
            found = exchange_of(settings(gpus, "ddp", accumulate=accumulate), links, 1, 1)
            (sent,) = found.sent_bytes.values()
            assert sent == pytest.approx(2 * (gpus - 1) / gpus * 4 * values, abs=1)
    assert exchange_of(settings(1, "ddp"), links, 1, 1).sent_bytes == {}
    # One process has nobody to share with.
    assert exchange_of(settings(1, "fsdp"), links, 1, 1).busy_ms == 0


# ---- time ---------------------------------------------------------------------------------


def test_the_slowest_link_decides():
    links = Links(8, 100, 5, "")
    assert [links.nodes(gpus) for gpus in (1, 8, 9, 16, 64)] == [1, 1, 2, 2, 8]
    rates = {gpus: links.rate_gb_per_s(gpus) / LINK_SHARE for gpus in (2, 8, 16, 12, 64)}
    # Of eight GPUs a node the eight links to the network carry eight rings; of six, six.
    assert rates == pytest.approx({2: 100, 8: 100, 16: 40, 12: 30, 64: 40})
    assert Links(1, 100, 5, "").rate_gb_per_s(4) == pytest.approx(5 * LINK_SHARE)
    assert Links(8, 100, 500, "").rate_gb_per_s(16) == pytest.approx(100 * LINK_SHARE)


def test_latency_counts_hops():
    links = Links(4, 1e12, 1e12, "")
    # Seven hops, of which those between the two nodes cost more.
    assert links.ring_ms(0, 8) == pytest.approx((8.4 + 5 * 5.7 + 2 * 14) / 1e3)
    assert links.ring_ms(0, 4, calls=3) == pytest.approx(3 * (8.4 + 3 * 5.7) / 1e3)
    assert links.ring_ms(10**9, 1) == 0


def test_ddp_waits_for_the_last_bucket_and_for_what_backward_does_not_hide():
    config = VideoMAEConfig.of("base")
    size = 4 * units_of(config).values
    one = Settings(config, 1, 2)
    links = Links(8, 1 / LINK_SHARE, 1, "")  # 1 GB/s, that is 1e6 bytes a millisecond
    last, rest = BUCKET_BYTES / 1e6, (size - BUCKET_BYTES) / 1e6
    for backward_ms, waits in ((0, last + rest), (100, last + rest - 100), (1e6, last)):
        found = exchange_of(one, links, backward_ms, forward_ms=1e9)
        # Latency apart: fifteen buckets there and back.
        assert found.exposed_ms == pytest.approx(waits, abs=0.5)
        assert found.busy_ms == pytest.approx(last + rest, abs=0.5)


def test_fsdp_waits_for_first_weights_and_last_gradients():
    config = VideoMAEConfig.of("base")
    units = units_of(config)
    links = Links(8, 1 / LINK_SHARE, 1, "")
    root, (first, *_, last) = units.root.shard(2), (b.shard(2) for b in units.blocks)
    blocks = sum(b.shard(2) for b in units.blocks)
    for accumulate in (1, 3):
        one = Settings(config, 1, 2, accumulate, parallel="fsdp")
        # Values that one of two sends, two bytes each as weights, four as gradients.
        ends = accumulate * 2 * (root + first + last) + 4 * root
        everything = accumulate * 2 * (root + 2 * blocks) + 4 * (root + blocks)
        hidden, shown = (exchange_of(one, links, ms, ms) for ms in (1e9, 0))
        assert hidden.exposed_ms == pytest.approx(ends / 1e6, rel=0.05)
        assert hidden.busy_ms == shown.busy_ms == pytest.approx(everything / 1e6, rel=0.01)
        assert shown.exposed_ms == pytest.approx(shown.busy_ms)
        # A pass hides no more than it takes.
        some = exchange_of(one, links, 10, 3)
        assert some.exposed_ms == pytest.approx(shown.busy_ms - accumulate * 13)


def test_scaling():
    plan = make_plan(Settings(VideoMAEConfig.of("base"), 8, 4, 2), find_gpu("a100"))
    rows = plan.scaling
    assert [row.settings.gpus for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert rows[2].step_ms == plan.step_ms
    assert (rows[0].scaling_efficiency, rows[0].exchange.exposed_ms) == (1, 0)
    for row in rows:
        gpus = row.settings.gpus
        assert row.clips_per_s == pytest.approx(1e3 * 16 * gpus / row.step_ms)
        assert row.scaling_efficiency == pytest.approx(rows[0].step_ms / row.step_ms)
    waits = [row.exchange.exposed_ms for row in rows]
    assert waits == sorted(waits)
    odd = replace(plan, settings=replace(plan.settings, gpus=24))
    assert [row.settings.gpus for row in odd.scaling] == [1, 2, 4, 8, 16, 24, 32, 64]


def test_copies_are_passes_over_memory():
    alone = make_plan(settings(1, "ddp"), find_gpu("a100"))
    for parallel in ("ddp", "fsdp"):
        several = make_plan(settings(4, parallel), alone.gpu)
        copies = copied_bytes(several.settings) / (1e6 * several.rates.copy_gb_per_s)
        without = StepTime.of(several.trace, several.rates)
        assert copies > 0
        assert several.floor.passes == pytest.approx(without.passes + copies)
    assert copied_bytes(alone.settings) == copied_bytes(settings(1, "fsdp")) == 0


def test_adamw_is_shared_under_fsdp():
    one = Settings(TINY, 2, 4)
    whole, parts = (
        make_plan(replace(one, parallel=kind), find_gpu("a100")) for kind in ("ddp", "fsdp")
    )
    assert parts.floor.optimizer == pytest.approx(whole.floor.optimizer / 4)


# ---- memory -------------------------------------------------------------------------------


def test_state_is_divided_under_fsdp():
    units = units_of(TINY)
    whole = state_parts(TINY, averaged=True)
    assert [whole[name] for name in ("weights", "gradients", "AdamW", "averaged weights")] == [
        4 * units.values * times for times in (1, 1, 2, 1)
    ]
    parts = state_parts(TINY, gpus=4, shards=4, averaged=True, gathered_itemsize=2)
    for name in ("weights", "gradients", "AdamW", "averaged weights"):
        assert parts[name] == pytest.approx(whole[name] / 4, rel=0.02)
        assert parts[name] >= whole[name] / 4
    block = max(block.shard(1) for block in units.blocks)
    gathered = 2 * (units.root.shard(1) + 2 * block)
    assert parts["gathered weights"] == pytest.approx(gathered, rel=0.02)
    several = state_parts(TINY, gpus=4, shards=4, accumulate=2, gathered_itemsize=2)
    assert several["gradients"] == parts["gradients"] + whole["gradients"]


def test_no_copies_of_weights_are_kept_under_fsdp():
    """Those that autocast would make are what was gathered."""
    whole, parts = (settings(2, kind).trace() for kind in ("ddp", "fsdp"))
    assert parts.num_parameters == whole.num_parameters
    # Of the embedding's weight there is no copy; of vectors in bf16 there are some in fp32.
    linears = sum(p.numel() for p in VideoMAE(TINY).parameters() if p.dim() == 2)
    saved = whole.kept_bytes - parts.kept_bytes
    assert saved == pytest.approx(2 * linears, rel=0.03)


def test_giant_fits_small_gpus_under_fsdp_alone():
    gpu = find_gpu("l4")
    one = Settings(
        VideoMAEConfig.of("giant"), 4, 4, checkpointing="block", averaged=True, parallel="ddp"
    )
    whole, parts = (make_plan(replace(one, parallel=kind), gpu) for kind in ("ddp", "fsdp"))
    assert not whole.fits
    assert parts.fits
    # Weights, both moments and the average, and what is exchanged.
    assert whole.memory_bytes - parts.memory_bytes > 0.7 * 4 * 4 * whole.trace.num_parameters


def test_what_does_not_fit_is_said():
    parts = make_plan(settings(8, "fsdp"), find_gpu("l4"))
    between = (parts.memory_bytes + parts.scaling[0].memory_bytes) / 2 / 2**30
    parts = make_plan(parts.settings, replace(parts.gpu, memory_gib=between))
    assert (parts.fits, parts.scaling[0].fits) == (True, False)
    (alone,) = [one for one in describe(parts).splitlines() if one.split()[:2] == ["1", "1"]]
    assert alone.endswith("does not fit")
    whole = make_plan(settings(8, "ddp"), replace(parts.gpu, memory_gib=0.1))
    assert "not even one clip fits; try checkpointing or fsdp" in describe(whole)


def test_memory_of_one_gpu_is_the_same_under_both():
    alone = Settings(TINY, 2)
    parts = memory_parts(alone, alone.trace())
    assert parts == memory_parts(replace(alone, parallel="fsdp"), alone.trace())


# ---- what it says -------------------------------------------------------------------------


def test_text_of_several():
    plan = make_plan(settings(16, "fsdp"), find_gpu("h100"))
    text = describe(plan)
    joined = " ".join(text.split())
    for words in (
        "16 x H100 80GB HBM3, fsdp", "what 16 GPUs of 2 nodes exchange", "weights, gathered",
        "weights in bf16", f"{plan.exchange.exposed_ms:,.1f} ms", f"{plan.step_ms:,.1f} ms",
        "(NVLink 4, published)", "6.25 between nodes (assumed; --network-gbs", "70% is counted on",
        f"{plan.scaling[-1].scaling_efficiency:.0%}", f"{plan.scaling[-1].clips_per_s:,.0f}",
    ):  # fmt: skip
        assert words in joined, words
    assert max(map(len, text.splitlines())) <= 100
    ddp = " ".join(describe(make_plan(settings(2, "ddp"), plan.gpu)).split())
    assert "behind the last backward pass" in ddp
    exact = settings(2, "fsdp", precision="fp32")
    assert "weights in fp32" in describe(make_plan(exact, plan.gpu))
    slow = " ".join(describe(make_plan(exact, find_gpu("rtx4090"))).split())
    assert "32 GB/s each way within a node (PCIe 4.0, published, less from socket" in slow


def test_text_of_one_says_nothing_of_several():
    text = describe(make_plan(settings(1, "fsdp"), find_gpu("h100")))
    assert "loading of clips and exchange of gradients are not counted" in text
    for words in ("fsdp", "scaling", "sent by", "waiting"):
        assert words not in text


def test_links():
    given = Links.of(find_gpu("l4"), 4, 10, 20)
    assert (given.gpus_per_node, given.node_gb_per_s, given.network_gb_per_s) == (4, 10, 20)
    assert "10 GB/s each way within a node (given), 20 between nodes (given)" in given.source
    assert Links.of(find_gpu("l4")).node_gb_per_s == 32
    assert Links.of(Gpu("other", 1, 1, 1, 1)).node_gb_per_s == 32
    for arguments, words in (
        ((0,), "gpus_per_node must be at least 1, got 0"),
        ((8, 0.0), "node_gbs must be above 0 GB/s, got 0"),
        ((8, None, -1.0), "network_gbs must be above 0 GB/s, got -1"),
    ):
        with pytest.raises(ValueError, match=words):
            Links.of(find_gpu("l4"), *arguments)
    for gpu in GPUS.values():
        # Far slower than a GPU's own memory.
        assert 4 < gpu.bandwidth_gb_per_s / LINKS[gpu.link].gb_per_s < 60, gpu.name
