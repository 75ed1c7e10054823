"""Small networks with drop path, of each family that is known, and what tests watch in them."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.ops import StochasticDepth


def with_rate(model, rate):
    """`model`, with the same rate in all its drop paths."""
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = rate
        elif type(module).__name__ == "DropPath":
            module.drop_prob = rate
    return model


def convnext(rate=0.5):
    settings = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 2)]
    model = ConvNeXt(settings, stochastic_depth_prob=rate, layer_scale=0.5, num_classes=3)
    return with_rate(model, rate)


def swin(rate=0.5, **options):
    arguments = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": [4, 4]}
    model = SwinTransformer(**arguments, **options, num_classes=3, stochastic_depth_prob=rate)
    return with_rate(model, rate)


def efficientnet(rate=0.5, **options):
    settings = [FusedMBConvConfig(2, 3, 1, 8, 8, 2), MBConvConfig(2, 3, 2, 8, 12, 2)]
    model = EfficientNet(settings, dropout=0.0, stochastic_depth_prob=0.1, num_classes=3, last_channel=8, **options)
    return with_rate(model, rate)


def timm_model(path, rate=0.5, **options):
    pytest.importorskip("timm")
    from timm import models

    family, _, name = path.rpartition(".")
    model = getattr(getattr(models, family), name)(num_classes=3, drop_path_rate=rate, **options)
    return with_rate(model, rate)


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 2}
TIMM_CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 12, 12), "output_stride": 8, "ls_init_value": 0.5}
LAYER_NORM = {
    "convnext": convnext,
    "swin": swin,
    "swin v2": partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    "timm convnext": partial(timm_model, "convnext.ConvNeXt", **TIMM_CONVNEXT),
    "timm convnext conv": partial(timm_model, "convnext.ConvNeXt", **TIMM_CONVNEXT, conv_mlp=True),
    "timm vit": partial(timm_model, "vision_transformer.VisionTransformer", **VIT),
    "timm vit layer scale": partial(timm_model, "vision_transformer.VisionTransformer", init_values=0.5, **VIT),
    "timm swin": partial(
        timm_model, "swin_transformer.SwinTransformer", img_size=16, patch_size=2, embed_dim=8, depths=(3,),
        num_heads=(2,), window_size=4,
    ),
    "timm beit": partial(timm_model, "beit.Beit", init_values=0.5, **VIT),
    "timm mixer": partial(
        timm_model, "mlp_mixer.MlpMixer", img_size=16, patch_size=4, embed_dim=12, num_blocks=3,
    ),
}  # fmt: skip
BATCH_NORM = {
    "efficientnet": efficientnet,
    "timm mobilenetv3": partial(timm_model, "mobilenetv3.mobilenetv3_small_050"),
    "timm mobilenetv4": partial(timm_model, "mobilenetv3.mobilenetv4_conv_small_035"),
    "timm edge": partial(timm_model, "efficientnet.efficientnet_es"),
    "timm regnet": partial(timm_model, "regnet.regnetx_002"),
    "timm resnet basic": partial(timm_model, "resnet.resnet10t"),
    "timm resnet": partial(timm_model, "resnet.resnet26"),
}
ALL = LAYER_NORM | BATCH_NORM


class Masked(nn.Module):
    """The reference: computes the branch of every sample, then multiplies it by a draw."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        kept = (torch.rand(len(x)) >= self.rate).to(x) / max(1 - self.rate, 1e-9)
        return x * kept.view(-1, *[1] * (x.dim() - 1)) if self.training else x


def masked(model, rate=0.5):
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for child, inner in list(module.named_children()):
            if type(inner).__name__ in ("DropPath", "StochasticDepth"):
                setattr(module, child, Masked(rate))
    return model


def images(size=6, seed=0):
    return torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def passed(model, batch, seed):
    """The output in training mode and all gradients; batch normalisation uses its running statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    model.zero_grad()
    torch.manual_seed(seed)
    output = model(batch)
    output.square().sum().backward()
    return output, {name: parameter.grad for name, parameter in model.named_parameters()}


class Sizes:
    """The number of samples that each branch's first layer gets, in a list for each block."""

    def __init__(self, model):
        self.of = {}
        for name, module in model.named_modules():
            if type(module).__name__ in ("CNBlock", "ConvNeXtBlock"):
                first = next(m for m in module.modules() if isinstance(m, nn.Conv2d))
                first.register_forward_hook(lambda _, inputs, __, name=name: self.of.setdefault(name, []).append(
                    len(inputs[0])
                ))  # fmt: skip
