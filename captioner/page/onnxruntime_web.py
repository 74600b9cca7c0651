"""onnxruntime-web, which computes in the browser."""

from pathlib import Path

from captioner.page.npm import Package

ONNXRUNTIME_WEB = Package(
    "onnxruntime-web",
    "1.30.0",
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    33_106_585,
)

# What a page needs of it, and what it is called there: not all servers know .mjs.
FILES = {
    "dist/ort.wasm.min.mjs": "ort.wasm.min.js",
    "dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.js",
    "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
}


def read_onnxruntime_web(source: Path | None = None) -> dict[str, bytes]:
    """Return the files that a page needs, by the names that they have there.

    The arguments and errors are those of ``Package.read``.
    """
    return dict(zip(FILES.values(), ONNXRUNTIME_WEB.read(FILES, source), strict=True))
