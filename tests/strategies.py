"""Hypothesis strategies: random networks of every block kind, small enough to build and run."""

from hypothesis import strategies as st

from triscale.architecture import Arch, Head, Numerics, Stage, Stem

PLAIN = ("separable", "basic", "bottleneck")  # no squeeze-excitation

numerics = st.builds(
    Numerics,
    padding=st.sampled_from(("same", "symmetric")),
    activation=st.sampled_from(("silu", "relu", "relu6")),
    norm_eps=st.floats(1e-6, 1e-2),
    norm_momentum=st.floats(0, 1),
    running_variance=st.sampled_from(("biased", "unbiased")),
    drop_path=st.floats(0, 0.9),
    drop_path_rule=st.sampled_from(("i/n", "i/(n-1)")),
    divisor=st.integers(1, 16),
    round_limit=st.floats(0, 1),
)


@st.composite
def stages(draw, most_channels=24, most_layers=3):
    block = draw(st.sampled_from(("conv", "separable", "mbconv", "fused_mbconv", "basic", "bottleneck")))
    return Stage(
        block=block,
        kernel=draw(st.sampled_from((1, 3, 5, 7))),
        stride=draw(st.integers(1, 2)),
        expand=draw(st.sampled_from((0.25, 0.5, 1, 1.5, 3, 6))),
        squeeze=0 if block in PLAIN else draw(st.sampled_from((0, 0.05, 0.25, 1))),
        skip=draw(st.sampled_from(("identity", "pool", "none"))),
        channels=draw(st.integers(1, most_channels)),
        layers=draw(st.integers(1, most_layers)),
        fixed_depth=draw(st.booleans()),
    )


def archs(most_stages=4, resolutions=(8, 40), most_channels=24):
    """Any valid network: all blocks, skips, paddings, activations, odd sizes and channel numbers."""
    stem = st.builds(
        Stem,
        channels=st.integers(1, most_channels),
        kernel=st.sampled_from((1, 3, 5, 7)),
        stride=st.integers(1, 2),
        pool=st.booleans(),
        scale=st.sampled_from(("width", "fixed", "at_most")),
    )
    head = st.builds(Head, channels=st.sampled_from((0, 1, 7, 16, 40)), scale=st.sampled_from(("width", "fixed", "at_least")))
    return st.builds(
        Arch,
        stem=stem,
        stages=st.lists(stages(most_channels), min_size=1, max_size=most_stages).map(tuple),
        head=head,
        resolution=st.integers(*resolutions),
        dropout=st.floats(0, 0.9),
        numerics=numerics,
        name=st.text(max_size=8),
    )
