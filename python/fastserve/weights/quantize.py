# SPDX-License-Identifier: Apache-2.0
"""`fastserve quantize`: an int4 checkpoint of a model, made layer by layer, so that a killed run goes on where it was.

Every linear of the layers becomes int4, the embedding and the head int8 by option; the rest is copied. With the method
"rtn" each weight is rounded for itself; with "gptq" a calibration text tells which errors matter. Then the text passes
through the layers as they will be served: a linear is calibrated on what the rounded ones before it make of the text,
and made to give what the original model gives there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastserve import _native
from fastserve.engine.device import DTYPES, CpuDevice
from fastserve.errors import ModelLoadError
from fastserve.json_file import read_json_object
from fastserve.layers import Precision, make_linear
from fastserve.model_config import CONFIG_FILE, ModelConfig
from fastserve.models import model_class_for
from fastserve.weights.calibration import CalibrationText, RecordingLinear
from fastserve.weights.gguf_blocks import TOGETHER
from fastserve.weights.gptq import round_gptq
from fastserve.weights.int8 import round_int8
from fastserve.weights.quantization_config import (
    WHOLE_ROW,
    QuantizationConfig,
    compressed_tensors_config,
    fastserve_config,
)
from fastserve.weights.quantized import QuantizedWeight
from fastserve.weights.quantized_checkpoint import QuantizedCheckpoint, pack_int8, pack_quantized
from fastserve.weights.round_int4 import FORMS, round_int4
from fastserve.weights.safetensors import INDEX_FILE, Checkpoint, open_checkpoint, read_header

METHODS = ("rtn", "gptq")
GROUP_SIZES = (32, 64, 128, -1)
EMBEDDING_DTYPES = ("auto", "int8")
EMBEDDINGS = ("model.embed_tokens", "lm_head")
CALIBRATION_CONTEXT = 512
COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE",
)  # fmt: skip
SETTINGS_FILE = "quantize.json"
Progress = Callable[[int, int], None]  # (layers done, layers)


@dataclass(frozen=True)
class QuantizeSettings:
    """method: one of METHODS. form: one of FORMS. group_size: inputs that share a scale; -1: all of a row.
    embedding_dtype: of the embedding and the head; "auto" as they are."""

    method: str = "rtn"
    form: str = "minimums"
    group_size: int = 32
    embedding_dtype: str = "auto"

    def __post_init__(self) -> None:
        allowed: dict[str, tuple[Any, ...]] = {
            "method": METHODS,
            "form": FORMS,
            "group_size": GROUP_SIZES,
            "embedding_dtype": EMBEDDING_DTYPES,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ModelLoadError(
                    f"{name}={getattr(self, name)!r} is not allowed; it is one of {', '.join(map(str, values))}"
                )

    @property
    def group_inputs(self) -> int:
        return WHOLE_ROW if self.group_size == -1 else self.group_size

    def quantization_config(self) -> dict[str, Any]:
        """For config.json: compressed-tensors where that format can say it, for other engines to read."""
        if self.form == "minimums" or self.embedding_dtype == "int8":
            return fastserve_config(self.group_size)
        return compressed_tensors_config(self.group_size, self.form == "symmetric")


def quantize_model(
    model_dir: str | Path,
    out_dir: str | Path,
    settings: QuantizeSettings,
    calibration: Sequence[int] = (),
    *,
    num_threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes an int4 copy of a model folder and returns it; it appears complete or not at all.

    calibration: token ids of a text, for the method "gptq". A run that was killed is taken up by the next one with the
    same model, settings and text; what it has done lies in a folder beside `out_dir`. An existing folder is replaced
    only with force=True, and only if it is a model folder. Raises ModelLoadError.
    """
    source, out = Path(model_dir), Path(os.path.abspath(out_dir))
    config = ModelConfig.from_dir(source)
    if config.quantization is not None:
        raise ModelLoadError(f"{source}: is quantised already ({config.quantization.method}); give the original model")
    if settings.method == "gptq" and len(calibration) < 2 * CALIBRATION_CONTEXT:
        least = 2 * CALIBRATION_CONTEXT
        raise ModelLoadError(f"gptq needs a calibration text of at least {least} tokens, got {len(calibration)}")
    _check_target(out, force)
    with _workspace(out, source, settings, calibration) as workspace, open_checkpoint(source) as checkpoint:
        with torch.inference_mode():
            _Run(config, checkpoint, settings, calibration, workspace, num_threads).run(progress)
        _write_rest(source, checkpoint, settings, workspace)
        if out.exists():
            shutil.rmtree(out)
        (workspace / SETTINGS_FILE).unlink()
        workspace.rename(out)
    return out


class _Run:
    """One model's way through the layers."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        settings: QuantizeSettings,
        calibration: Sequence[int],
        workspace: Path,
        num_threads: int | None,
    ) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.settings = settings
        self.workspace = workspace
        self.device = CpuDevice(num_threads)
        torch.set_num_threads(_native.num_threads())  # the native pool rests while torch multiplies
        self.model_class = model_class_for(config.architecture)
        self.weights = self.model_class.open_weights(
            config, checkpoint, self.device, Precision(torch.float32, False, False, False, 16)
        )
        self.text = None
        if settings.method == "gptq":
            embedding = self.weights.take("model.embed_tokens.weight", (config.vocab_size, config.hidden_size))
            self.text = CalibrationText(config, self.device, embedding, calibration, CALIBRATION_CONTEXT)

    def run(self, progress: Progress | None) -> None:
        for index in range(self.config.num_layers):
            path = self.workspace / _layer_file(index)
            if self.text is not None:
                self._round_for_text(self.text, index, path)
            elif not path.exists():
                _save_layer({name: self._round(name) for name in self._names(index)}, path)
            if progress is not None:
                progress(index + 1, self.config.num_layers)

    def _names(self, index: int) -> list[str]:
        return [name for names in _linears(index).values() for name in names]

    def _round_for_text(self, text: CalibrationText, index: int, path: Path) -> None:
        """Linear by linear, in the order in which the text passes them. A layer that was finished by an earlier run
        lets the text through."""
        layer = self.model_class.layer(self.config, self.weights, index)
        recorders = {attribute: RecordingLinear(getattr(layer, attribute)) for attribute in _linears(index)}
        for attribute, recorder in recorders.items():
            setattr(layer, attribute, recorder)
        finished = _read_layer(path, self.settings) if path.exists() else None
        rounded: dict[str, QuantizedWeight] = {}
        for attribute, names in _linears(index).items():
            recorder = recorders[attribute]
            if finished is None:
                recorder.record()
                text.record(layer, list(recorders.values()))
                recorder.records = False
                rounded |= {name: self._round(name, recorder) for name in names}
            else:
                rounded |= {name: finished[name] for name in names}
            weight = torch.cat([rounded[name].dequantize() for name in names])
            recorder.rounded = make_linear(
                self.device, weight, getattr(recorder.exact, "bias", None), recorder.is_gated
            )
        if finished is None:
            _save_layer(rounded, path)
        if index + 1 < self.config.num_layers:
            text.advance(layer, list(recorders.values()))

    def _round(self, name: str, seen: RecordingLinear | None = None) -> QuantizedWeight:
        weight = self.checkpoint.tensor(f"{name}.weight").to(torch.float32)
        size, form = self.settings.group_inputs, self.settings.form
        if seen is None:
            return round_int4(weight, size, form)
        return round_gptq(weight, seen.hessian, size, form, seen.drift)


_PARTS = {"qkv": TOGETHER[0], "o": ("o_proj",), "gate_up": TOGETHER[1], "down": ("down_proj",)}


def _linears(index: int) -> dict[str, list[str]]:
    """The int4 linears of a layer: attribute of the layer -> names in the checkpoint, in the order of their rows."""
    blocks = {"qkv": "self_attn", "o": "self_attn", "gate_up": "mlp", "down": "mlp"}
    return {a: [f"model.layers.{index}.{blocks[a]}.{part}" for part in parts] for a, parts in _PARTS.items()}


def _layer_file(index: int) -> str:
    return f"model-layer-{index:05}.safetensors"


def _read_layer(path: Path, settings: QuantizeSettings) -> dict[str, QuantizedWeight]:
    method = "fastserve" if settings.form == "minimums" else "compressed-tensors"
    checkpoint = Checkpoint(read_header(path))
    quantized = QuantizedCheckpoint(
        checkpoint, QuantizationConfig(method, settings.group_inputs, settings.form == "symmetric")
    )
    names = [name.removesuffix(".weight_packed") for name in checkpoint if name.endswith(".weight_packed")]
    shapes = {name: checkpoint.tensor(f"{name}.weight_shape").tolist() for name in names}
    return {name: quantized.read(name, *shape) for name, shape in shapes.items()}


def _save_layer(rounded: dict[str, QuantizedWeight], path: Path) -> None:
    _save({f"{n}.{part}": t for n, w in rounded.items() for part, t in pack_quantized(w).items()}, path)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A file that is whole or not there."""
    from safetensors.torch import save_file

    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.rename(path)


def _write_rest(source: Path, checkpoint: Checkpoint, settings: QuantizeSettings, workspace: Path) -> None:
    """What is not int4, config.json, the index, and the tokenizer's files."""
    config = ModelConfig.from_dir(source)
    layers = {name for index in range(config.num_layers) for names in _linears(index).values() for name in names}
    rest: dict[str, torch.Tensor] = {}
    dtype: torch.dtype | None = None
    for name in checkpoint:
        matrix = name.removesuffix(".weight")
        if matrix in layers:
            continue
        tensor = checkpoint.tensor(name)
        dtype = dtype or tensor.dtype
        if settings.embedding_dtype == "int8" and matrix in EMBEDDINGS:
            int8 = pack_int8(round_int8(tensor, settings.group_inputs))
            rest |= {f"{matrix}.{part}": value for part, value in int8.items()}
        else:
            rest[name] = tensor
    _save(rest, workspace / "model-rest.safetensors")
    weight_map = dict.fromkeys(rest, "model-rest.safetensors")
    for index in range(config.num_layers):
        weight_map |= dict.fromkeys(read_header(workspace / _layer_file(index)), _layer_file(index))
    _write_json(workspace / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    data = read_json_object(source / CONFIG_FILE, allow_nan=True)
    data.setdefault("torch_dtype", {v: k for k, v in DTYPES.items()}[dtype or torch.float32])
    _write_json(workspace / CONFIG_FILE, {**data, "quantization_config": settings.quantization_config()})
    for name in COPIED_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, workspace / name)


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(out: Path, force: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ModelLoadError(f"{out}: exists and is not a folder")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise ModelLoadError(f"{out}: exists already; --force replaces it")
        if not (out / CONFIG_FILE).exists():
            raise ModelLoadError(f"{out}: exists and holds no {CONFIG_FILE}, so it is no model folder to replace")


@contextmanager
def _workspace(out: Path, source: Path, settings: QuantizeSettings, calibration: Sequence[int]) -> Iterator[Path]:
    """A folder beside `out`, kept between runs of the same job, used by one process at a time."""
    text = hashlib.sha256(repr(list(calibration)).encode()).hexdigest()
    files = {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(source.glob("*.safetensors"))}
    job = {"model": str(source.resolve()), "files": files, "text": text, **asdict(settings)}
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.quantize"
    lock = out.parent / f".{out.name}.quantize.lock"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ModelLoadError(f"{out}: another process is quantising to this folder") from None
        path = folder / SETTINGS_FILE
        if folder.exists() and (not path.exists() or json.loads(path.read_text()) != job):
            shutil.rmtree(folder)  # of another job
        folder.mkdir(exist_ok=True)
        _write_json(path, job)
        yield folder
        lock.unlink()
