"""Model families, one file each, and their named sizes."""

from .variants import build_variant, list_variants, register_variant

__all__ = ["build_variant", "list_variants", "register_variant"]
