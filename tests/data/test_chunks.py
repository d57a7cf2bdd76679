"""What one chunk of pictures tells."""

import time

from raydistill.config import Images
from raydistill.data.chunks import decode_chunk, inspect_chunk


def test_very_many_files_that_are_not_there_are_refused_soon(tmp_path, monkeypatch) -> None:
    for k in range(200):  # of which each error of ours has to know whether it is a secret
        monkeypatch.setenv(f"OTHER_{k}", "x" * 20)
    chunk = [(k, f"{tmp_path}/{k}.png", None) for k in range(10_000)]
    for work in (inspect_chunk, decode_chunk):
        began = time.process_time()
        found = list(work(chunk, Images(path="x")))
        assert time.process_time() - began < 2
        reasons = {one["reason"] if isinstance(one, dict) else one.reason for one in found}
        assert reasons == {"cannot be read: No such file or directory"}
