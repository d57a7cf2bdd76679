"""export: the forms in which the student ships, and where it goes."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from raydistill.config.section import Section, Share


class Export(Section):
    """The forms in which `export` writes the student."""

    formats: tuple[Literal["onnx", "onnx_picture", "torch_export"], ...] = ("onnx", "onnx_picture", "torch_export")
    """Beside the folder for timm or transformers, which is always written. `onnx_picture` takes one uint8 picture of
    any size, with the preprocessing inside, and gives probabilities."""
    preprocessing: bool = False
    """Put resizing and normalising inside the graphs. They then take square uint8 images (N, H, H, 3) of images.size,
    and otherwise normalised ones (N, 3, S, S) of student.size."""
    int8: Literal["dynamic", "static"] | None = None
    """Also an ONNX file with INT8 weights; `static`: and INT8 activations, calibrated on train images."""
    int8_max_drop: Share = 0.05
    """The accuracy on val that INT8 may lose, where 0.05 is five points; without labels, the share of answers that it
    may change. A file that loses more is left out. 1: any loss."""
    allow_useless: bool = False
    """Also export a student that is no better than always naming the commonest class."""
    hub: str | None = None
    """A repository on the Hugging Face hub to push the folder to; private, if it is new."""
    register_as: str | None = None
    """A name in MLflow's model registry for the student; null: it is logged and not registered."""

    @model_validator(mode="after")
    def _has_onnx(self) -> Export:
        if self.int8 is not None and "onnx" not in self.formats:
            raise ValueError(f"export.int8={self.int8} is made from the ONNX file; put onnx into export.formats")
        return self
