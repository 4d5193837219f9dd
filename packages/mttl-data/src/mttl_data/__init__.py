"""Tasks, their rows and their scores.

The public names are in ``__init__.pyi``; each is loaded when it is first asked for, so that
importing the package costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
