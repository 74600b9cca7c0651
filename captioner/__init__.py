"""captioner: a pretrained CNN encoder and a recurrent decoder turn an image into a sentence."""

from typing import TYPE_CHECKING, Any

from captioner.version import __version__

if TYPE_CHECKING:
    from captioner.inference.captioner import Captioner

__all__ = ["Captioner", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported when asked for: scoring and annotations must not wait for torch.
    if name == "Captioner":
        from captioner.inference.captioner import Captioner

        return Captioner
    raise AttributeError(f"module 'captioner' has no attribute '{name}'")
