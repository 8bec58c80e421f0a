"""Hugging Face models as Leeway uses them: load, describe, publish, take published weights, save.

The only shared package that imports transformers and torch.
"""

from leeway.huggingface.directory import (
    load_model,
    load_tokenizer,
    model_outline,
    model_signature,
    save_model,
)
from leeway.huggingface.published import (
    check_published,
    load_published,
    published_parts,
    published_tensors,
    tensor_bytes,
    tensor_dtype_name,
    tensor_from_bytes,
    torch_dtype,
)

__all__ = [
    "check_published",
    "load_model",
    "load_published",
    "load_tokenizer",
    "model_outline",
    "model_signature",
    "published_parts",
    "published_tensors",
    "save_model",
    "tensor_bytes",
    "tensor_dtype_name",
    "tensor_from_bytes",
    "torch_dtype",
]
