import os

# huggingface_hub reads this when it is imported, so it is set before any test module is.
os.environ["HF_HUB_DISABLE_XET"] = "1"  # a loopback hub does not speak Xet
