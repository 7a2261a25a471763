"""Every architecture with the inputs that it takes, and the variants in which it is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from architectures import classic, fusion, mixed, signal, windows
from architectures.sweep import Variant

IMAGE = (2, 3, 32, 32)


@dataclass(frozen=True)
class Architecture:
    """A module and its input.

    Attributes:
        name: in lower case.
        build: makes the module.
        shape: of the input.
        free: axes of the input that may be free dimensions.
    """

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = IMAGE
    free: tuple[int, ...] = (0, 2, 3)


_FIXED_SIZE = (0,)
ARCHITECTURES = [
    Architecture("vgg", classic.Vgg, free=_FIXED_SIZE),
    Architecture("resnet50", classic.Resnet50),
    Architecture("resnext", classic.Resnext),
    Architecture("densenet", classic.Densenet),
    Architecture("inception", classic.Inception),
    Architecture("mobilenet", classic.Mobilenet),
    Architecture("unet", classic.Unet),
    Architecture("unet_plus", classic.UnetPlus),
    Architecture("hrnet", fusion.Hrnet),
    Architecture("dla", fusion.Dla),
    Architecture("res2net", fusion.Res2net),
    Architecture("dpn", fusion.Dpn),
    Architecture("sknet", fusion.Sknet),
    Architecture("resnest", fusion.Resnest),
    Architecture("ghostnet", fusion.Ghostnet),
    Architecture("repvgg", fusion.Repvgg),
    Architecture("nfnet", fusion.Nfnet),
    Architecture("fpn", fusion.Fpn),
    Architecture("deeplab", fusion.Deeplab),
    Architecture("swin", windows.Swin, free=_FIXED_SIZE),
    Architecture("swin2", windows.Swin2, free=_FIXED_SIZE),
    Architecture("maxvit", windows.Maxvit, free=_FIXED_SIZE),
    Architecture("mobilevit", windows.Mobilevit, free=_FIXED_SIZE),
    Architecture("xcit", mixed.Xcit, free=_FIXED_SIZE),
    Architecture("levit", mixed.Levit, free=_FIXED_SIZE),
    Architecture("pvt", mixed.Pvt, free=_FIXED_SIZE),
    Architecture("coat", mixed.Coat, free=_FIXED_SIZE),
    Architecture("twins", mixed.Twins, free=_FIXED_SIZE),
    Architecture("crossvit", mixed.Crossvit, free=_FIXED_SIZE),
    Architecture("edgenext", mixed.Edgenext, free=_FIXED_SIZE),
    Architecture("espcn", signal.Espcn, (2, 3, 12, 12)),
    Architecture("edsr", signal.Edsr, (2, 3, 12, 12)),
    Architecture("esrgan", signal.Esrgan, (2, 3, 12, 12)),
    Architecture("crnn", signal.Crnn, (2, 1, 16, 48), (0, 3)),
    Architecture("wav2vec", signal.Wav2vec, (2, 1, 400), (0, 2)),
    Architecture("crepe", signal.Crepe, (2, 512), _FIXED_SIZE),
    Architecture("group_norm", signal.Grouped, (2, 3, 16, 16)),
    Architecture("convnext", signal.Convnext),
    Architecture("fastvit", signal.RepMixer),
]


# The newer exporter takes seconds: in the tests it is tried on one network of each kind.
_BY_DYNAMO = {
    "resnet50",
    "densenet",
    "inception",
    "unet",
    "sknet",
    "ghostnet",
    "deeplab",
    "xcit",
    "levit",
    "crnn",
    "edsr",
}


def smoke(architecture: Architecture) -> list[Variant]:
    """Two variants, for the tests: free dimensions without constants, fixed ones with biases and shifts kept."""
    by_dynamo = architecture.name in _BY_DYNAMO
    return [Variant(dynamo=False, free=architecture.free, silent=True), Variant(dynamo=by_dynamo)]


def full(architecture: Architecture) -> list[Variant]:
    """Both exporters, fixed and free, with and without what constants leave behind, norms kept, and three seeds."""
    free = architecture.free
    return [
        Variant(),
        Variant(silent=True),
        Variant(free=free, silent=True),
        Variant(free=free[:1], together=False, seed=1),
        Variant(fold=False),
        Variant(dynamo=False, together=False, seed=2),
        Variant(dynamo=False, free=free, fold=False),
        Variant(dynamo=False, free=free, silent=True, seed=1),
        Variant(dynamo=False, fold=False, silent=True, seed=2),
    ]
