"""A repository on a loopback hub, and what tests do with it."""

import io

from huggingface_hub import CommitOperationAdd

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
REPO = "user/library"


def put(api, files, repo_type="model", **options):
    """Commit files as the stores do, from open files, which the client uploads over HTTP."""
    operations = [CommitOperationAdd(path, io.BytesIO(data)) for path, data in files.items()]
    options = {"commit_message": "put", "repo_type": repo_type, **options}
    return api.create_commit(REPO, operations, **options)


def own_files(hub, **options):
    files = hub.files(REPO, **options)
    files.pop(".gitattributes")
    return files
