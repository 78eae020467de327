"""One of each kind of thing that a package can add; importing it registers what is known by a name."""

from one_of_each import backend, interpolant, mixer, optimizer, samplers, tracker  # noqa: F401
