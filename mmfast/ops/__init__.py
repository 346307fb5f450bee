"""The operations of ``torch.ops.mmfast``: importing this package registers all of them.

Importing torch may import this package (:mod:`mmfast.registration`), in the middle of any module that imports torch
first. What is imported here therefore takes no names out of modules above this package or beside it, except of those
that need no torch; ``from mmfast import backends`` is safe, ``from mmfast.backends import choose`` is not.
"""

import torch  # noqa: F401 - before our own, see above

from mmfast.ops import augment, barlow_twins  # noqa: F401
