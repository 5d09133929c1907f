"""`load_model`: what is not there is said."""

import pytest

from lil_ops.models import load_model


@pytest.mark.parametrize("path", ["no-such-model.gguf", "/no/such/folder", "./no/such", "no-such-model"])
def test_a_missing_path(path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_model(path)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="found neither"):
        load_model(tmp_path)


def test_a_folder_with_two_gguf_files(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=r"found a\.gguf, b\.gguf"):
        load_model(tmp_path)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"expected a \.gguf file or a folder"):
        load_model(tmp_path / "model.bin")
