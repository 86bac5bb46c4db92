"""Find a denoiser's repeated transformer blocks: units of quantization, compilation and FSDP2."""

from __future__ import annotations

from torch import nn

from lit_prefopt.errors import InputError


def repeated_blocks(net: nn.Module) -> list[nn.Module]:
    """Return a denoiser's repeated transformer blocks, in the order of its modules.

    Their classes are those that diffusers compiles one by one (`_repeated_blocks`: of a UNet
    BasicTransformerBlock), or, where it names none, those that it never splits over devices
    (`_no_split_modules`: of Stable Diffusion 3 JointTransformerBlock), as far as they stand in a
    list of modules; a patch embedding that must not be split is not repeated.

    Args:
        net: A denoiser of diffusers, with or without an adapter.
    """
    compiled = set(getattr(net, "_repeated_blocks", None) or ())
    if compiled:
        return [m for m in net.modules() if type(m).__name__ in compiled]
    whole = set(getattr(net, "_no_split_modules", None) or ())
    lists = [m for m in net.modules() if isinstance(m, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if type(block).__name__ in whole]


def require_blocks(net: nn.Module, option: str) -> list[nn.Module]:
    """Return a denoiser's repeated transformer blocks.

    Args:
        net: A denoiser of diffusers.
        option: The option that works block by block, such as `--backbone.compile`.

    Raises:
        InputError: It has none.
    """
    if not (found := repeated_blocks(net)):
        raise InputError(
            f"{type(net).__name__} has no repeated transformer blocks, by which `{option}` works: "
            "leave it out."
        )
    return found
