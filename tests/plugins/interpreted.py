"""A process in which Triton's kernels are interpreted on the CPU, asked over pipes: op, arrays, attributes → array.

Triton reads TRITON_INTERPRET when it is imported, so a process interprets or compiles, never both. bf16 travels as
its bits (uint16), for numpy has no such type.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent


class Interpreted:
    """The process, as a context manager; call it for an op's output."""

    def __enter__(self) -> Interpreted:
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "tests.plugins.interpreted"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT, env=environment)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()

    def __call__(self, op: str, arrays: Sequence[np.ndarray], attributes: Sequence[float] = ()) -> Any:
        """The output of ``op``; what the process raised is raised here."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((op, list(arrays), list(attributes)), self.process.stdin)
        self.process.stdin.flush()
        answer = pickle.load(self.process.stdout)  # noqa: S301 (from our own process)
        if isinstance(answer, Exception):
            raise answer
        return answer


def mend_dot() -> None:
    """Triton 3.7's interpreter multiplies the bits of bf16 in a dot; widening them first changes no value."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    plain = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        wide = [self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)]
        return plain(self, *wide, *rest)

    InterpreterBuilder.create_dot = create_dot


def serve() -> None:
    """Answer until stdin ends."""
    import torch

    from plugins.kernels.launch_torch import run

    mend_dot()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            op, arrays, attributes = pickle.load(sys.stdin.buffer)  # noqa: S301 (from the tests)
        except EOFError:
            return
        try:
            tensors = [torch.from_numpy(np.array(a)) for a in arrays]
            halves = [t.view(torch.bfloat16) if t.dtype == torch.uint16 else t for t in tensors]
            out = run(op, halves, attributes)
            answer: Any = (out.view(torch.uint16) if out.dtype == torch.bfloat16 else out).numpy()
        except Exception as e:  # whatever it is, the test shall show it
            answer = e if type(e).__module__ == "graphs.errors" else RuntimeError(f"{type(e).__name__}: {e}")
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
