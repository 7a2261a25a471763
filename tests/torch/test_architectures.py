"""A stage or two of many architectures, pruned and exported: exact, smaller, and as small as the analysis says."""

from __future__ import annotations

import pytest

pytest.importorskip("torch.onnx", reason="PyTorch is not installed")
pytest.importorskip("onnxscript", reason="onnxscript, which torch.onnx.export needs, is not installed")

from architectures.catalogue import ARCHITECTURES, Architecture, smoke
from architectures.sweep import Finding, Variant, sweep

# Nothing in them keeps channels that carry nothing: no groups of unequal survivors, products of axes, or LayerNorm.
TIGHT = {
    *("vgg", "resnet50", "densenet", "mobilenet", "unet", "unet_plus", "hrnet", "dla", "repvgg", "fpn"),
    *("deeplab", "espcn", "esrgan", "fastvit"),
}
# The second run joins groups that the first one kept apart, each with a channel that stands for its constants.
SHRINKS_TWICE = {"nfnet-traced-together"}


def cases() -> list[object]:
    return [
        pytest.param(architecture, variant, id=f"{architecture.name}-{variant}")
        for architecture in ARCHITECTURES
        for variant in smoke(architecture)
    ]


@pytest.mark.parametrize(("architecture", "variant"), cases())
def test_architecture(architecture: Architecture, variant: Variant) -> None:
    finding: Finding = sweep(architecture.build, architecture.shape, variant)
    assert finding.exact, f"error {finding.error:.1e} of the range, noise {finding.noise:.1e}"
    assert finding.after < finding.before
    if f"{architecture.name}-{variant}" not in SHRINKS_TWICE:
        assert finding.again == finding.after
    if architecture.name in TIGHT:
        assert {name: found for name, found in finding.extra.items() if found[0] > 1} == {}
