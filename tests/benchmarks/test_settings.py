"""What candidates compute with, where, and what they need."""

import argparse
import importlib.util

import pytest

from benchmarks import settings


@pytest.fixture
def read(monkeypatch):
    """Reads flags as a benchmark does; every package is there, and the gpus are those given."""

    def read(*flags, gpus=(), missing=()):
        monkeypatch.setattr(settings, 'gpus', lambda: list(gpus))
        monkeypatch.setattr(
            importlib.util, 'find_spec', lambda name: None if name in missing else 'here'
        )
        parser = argparse.ArgumentParser()
        parser.add_argument('--candidates', nargs='+', default=['gcnet_jax'])
        settings.add_flags(parser)
        return settings.read_flags(parser, parser.parse_args(flags))

    return read


def test_a_gpu_is_taken_where_there_is_one(read):
    assert read() == settings.Setting('cpu', 'float32')
    assert read(gpus=['H100']).device == 'gpu'
    assert read('--device', 'cpu', gpus=['H100']).device == 'cpu'
    assert read('--precision', 'tf32').dtype == 'float32'
    assert read('--precision', 'bfloat16').dtype == 'bfloat16'


@pytest.mark.parametrize('flags', [('--device', 'gpu'), ('--precision', 'bfloat16')])
def test_onnx_files_run_on_the_cpu_in_float32(read, capsys, flags):
    with pytest.raises(SystemExit):
        read('--candidates', 'OpenVINO', *flags)
    assert 'OpenVINO runs with --device cpu --precision float32 only' in capsys.readouterr().err


def test_a_missing_package_is_named(read, capsys):
    with pytest.raises(SystemExit):
        read('--candidates', 'gcnet_jax', 'OpenVINO', missing=['openvino'])
    assert 'OpenVINO needs openvino: pip install' in capsys.readouterr().err


def test_gpus_are_those_that_the_driver_names(tmp_path, monkeypatch):
    driver = tmp_path / 'nvidia-smi'
    monkeypatch.setenv('PATH', f'{tmp_path}:/usr/bin:/bin')
    driver.write_text('#!/bin/sh\necho NVIDIA H100 80GB HBM3\n')
    driver.chmod(0o755)
    assert settings.gpus() == ['NVIDIA H100 80GB HBM3']
    driver.write_text('#!/bin/sh\nexit 9\n')
    assert settings.gpus() == []
    monkeypatch.setenv('PATH', str(tmp_path / 'nothing'))
    assert settings.gpus() == []


def test_without_a_gpu_the_memory_is_that_of_the_process():
    assert settings.peak_bytes() > 2**20
