"""Experts of other formats in, and out.

In: ``find_experts`` looks at PEFT folders, hub ids and older libraries, ``plan_import`` says what
would be added to a library, ``run_import`` does it, and ``open_plain`` shows adapters as they lie.
Out: ``export_peft``, ``export_dense`` and ``export_gguf``.
"""
