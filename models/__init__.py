"""The networks, and the models that they make up: one file a network, one a family."""

from models import sd3, sdxl

FAMILIES = [sdxl.FAMILY, sd3.FAMILY]  # a port adds its family here


def family_of(name: str):
    """The family of that name."""
    return next(family for family in FAMILIES if family.name == name)
