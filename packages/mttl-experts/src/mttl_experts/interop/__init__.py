"""Experts of other formats in, and out.

In: ``find_experts`` looks at PEFT folders, hub ids and older libraries, ``plan_import`` says what
would be added to a library, ``run_import`` does it, and ``PlainExpertLibrary`` shows adapters as
they lie. Out: ``export_dense`` and ``export_gguf``; a PEFT folder is ``library.path(name)`` as it
is. The names are in ``__init__.pyi``, and each is loaded when it is first asked for.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
