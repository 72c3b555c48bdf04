"""`MegaMoE`: a module of torch that holds its weights and shares its buffer: one object, bf16 in and out."""

from __future__ import annotations

import copy
import importlib
import os
from typing import Any

import torch

from megamoe_jit._device.capture import refuse_capture
from megamoe_jit._errors import ConfigError
from megamoe_jit._layer import operators as _operators
from megamoe_jit._layer import workspace as _workspaces
from megamoe_jit._layer.buffer import SymmBuffer
from megamoe_jit._layer.checks import check_shared_weight, require_topology
from megamoe_jit._layer.from_mxfp4 import check_rounding
from megamoe_jit._layer.given_weights import WeightTensors
from megamoe_jit._layer.module_state import ModuleState
from megamoe_jit._layer.plain_weights import (
    check_format,
    check_layer,
    check_matrix,
    check_same,
    format_given,
    in_order,
    own_pair,
)
from megamoe_jit._layer.serving import serve
from megamoe_jit._layer.stage import stage
from megamoe_jit._layer.weights import mark_transformed, transform_weights_for_mega_moe_sm90
from megamoe_jit._spec import FP8, WeightFormat, check_clamp, check_flag
from megamoe_jit._text import shown


class MegaMoE(ModuleState):
    """One MoE layer on one GPU, as a module of torch: floating-point tensors in, bf16 out.

    Args:
        w13: gate rows then up rows of each expert: bf16, float16 or float32 ``[experts, 2 * intermediate, hidden]``
            on a CUDA device, which is then the layer's; or a pair of e4m3 or e5m2 codes of that shape and fp32 scales
            ``[experts, 2 * intermediate / 128, hidden / 128]``; or MXFP4 codes, two to a byte, low nibble first, uint8,
            int8 or float4_e2m1fn_x2 ``[experts, 2 * intermediate, hidden / 2]`` and e8m0 exponents, float8_e8m0fnu or
            uint8 ``[experts, 2 * intermediate, hidden / 32]``. Sizes are multiples of 128. What is marked as being in
            the kernel's order stays in it.
        w2: ``[experts, hidden, intermediate]``, and scales ``[experts, hidden / 128, intermediate / 128]``, likewise.
        topk: slots of a token, 1 to 32.
        max_tokens: most tokens of a launch, 1 to 32768; the capacity is rounded up to a multiple of 128. Batches with
            more tokens are served in chunks of that size, with the bits of one call.
        clamp: bounds the gate from above and the up projection on both sides, 0 or more; None for no bound.
        fast_math: approximate exponential and reciprocal in SwiGLU; nothing else changes.
        inplace: keep pairs where they are, and bring their codes into the kernel's order there, instead of in a copy.
        weight_format: "fp8", "mxfp4" or "fp8e5m2", to be sure that the weights are that; None for what they are.
        rounding: "nearest" rounds MXFP4 values that are too small beside others of their block of 128 x 128, which None
            refuses; see `transform_weights_for_mega_moe_sm90`.
        num_shared_experts: experts that every token goes to beside, in the same launch: those of `shared_w13` and
            `shared_w2`, or the last ones of `w13` and `w2`, which then hold the routed experts and these.
        shared_w13: as `w13`, ``[shared experts, 2 * intermediate, hidden]``. One that is n times as wide is n experts.
        shared_w2: ``[shared experts, hidden, intermediate]``, likewise.
        shared_weight: weight of what shared experts give.
        topology: a `NodeTopology`, where the experts are on the ranks of several nodes: then `w13` and `w2` are this
            rank's, ids count all ranks' experts, and a call is a collective of all ranks.
        workspace: "shared" for the buffer of all layers with this shape, capacity and device, as in a model whose
            layers run one after the other, on branches of a captured graph too; "own" for one of its own, as for layers
            that run at the same time: in graphs that are replayed on other streams; or a `SymmBuffer` of this shape;
            with a topology, a `MultiNodeBuffer`.

    Attributes:
        buffer: the layer's `SymmBuffer`.
        l1: codes of `w13` in the kernel's order and their float32 scales; of MXFP4, codes, exponents and scales.
            Shared experts are last.
        l2: the same of `w2`.
        num_shared_experts: how many are shared.
        weight_format: the name of the format that the weights are in.

    The weights are buffers of the module and no parameters. `state_dict` gives them in the plain order, as `w13`,
    `w13_scales`, `w2` and `w2_scales`, those of shared experts apart, as `shared_w13` and so on, in the CPU's memory;
    of MXFP4 as the codes and e8m0 exponents that were given, `w13`, `w13_exponents` and so on. `load_state_dict` takes
    these, or for a layer in FP8 values to quantise and no scales, writes them where the weights are and needs no second
    copy. `to()`, `half()` and their kin leave a layer's dtypes as they are, and refuse to move it.

    Raises:
        ConfigError: a shape, dtype or value is not supported, or the memory is not there (says the bytes).
        UnsupportedDeviceError: there is no GPU, or it is no Hopper GPU.
        CaptureError: the current stream is capturing a CUDA graph.

    Example:
        >>> layer = MegaMoE(w13, w2, topk=6, max_tokens=4096)
        >>> y = layer(x, topk_idx, topk_weights)
    """

    _lease: Any
    l2_codes: torch.Tensor

    @torch.no_grad()
    def __init__(
        self,
        w13: torch.Tensor | WeightTensors,
        w2: torch.Tensor | WeightTensors,
        *,
        topk: int,
        max_tokens: int,
        clamp: float | None = None,
        fast_math: bool = True,
        inplace: bool = False,
        num_shared_experts: int | None = None,
        shared_w13: torch.Tensor | WeightTensors | None = None,
        shared_w2: torch.Tensor | WeightTensors | None = None,
        shared_weight: float = 1.0,
        topology: Any = None,
        workspace: Any = "shared",
        weight_format: str | None = None,
        rounding: str | None = None,
    ) -> None:
        super().__init__()
        shape = check_layer(w13, w2, topk, num_shared_experts, (shared_w13, shared_w2))
        device = check_matrix("w13", w13, 3).device
        check_clamp("clamp", clamp)
        check_flag("fast_math", fast_math)
        check_flag("inplace", inplace)
        stored = format_given("w13", w13)
        if weight_format is not None:
            check_format("w13", w13, WeightFormat.parse(weight_format))
        self.weight_format, self._rounded = stored.name, check_rounding(rounding)
        self._names = tuple(tuple(f"{matrix}_{part}" for part in stored.part_names) for matrix in ("l1", "l2"))
        if inplace and shared_w13 is not None:
            raise ConfigError("inplace = True with shared_w13; allowed: w13 and w2 that end with the shared experts")
        self.clamp, self.fast_math = None if clamp is None else float(clamp), fast_math
        self.shared_weight, self.num_shared_experts = check_shared_weight(shared_weight, shape.shared), shape.shared
        self._spread = topology is not None
        wanted = shape, max_tokens, device, workspace  # refused before weights are quantised
        spread = None if topology is None else require_topology(topology)
        self._lease = _workspaces.lease(*wanted) if spread is None else spread.lease(*wanted)
        self._workspace = self._lease.name
        try:
            with torch.inference_mode(False), torch.no_grad():  # experts made in it could not be exchanged outside
                pairs = in_order(w13, w2, shared_w13, inplace)
                if pairs is None:
                    l1 = own_pair("w13", w13, shared_w13, device, inplace)
                    l2 = own_pair("w2", w2, shared_w2, device, inplace)
                    pairs = transform_weights_for_mega_moe_sm90(l1, l2, inplace=True, rounding=rounding)
        except BaseException:
            self._lease.release()
            raise
        for name, tensor in zip(self._held, (*pairs[0], *pairs[1]), strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def from_checkpoint(cls, path: str | os.PathLike[str], layer: int, **options: Any) -> MegaMoE:
        """A layer with the experts of one layer of a model, from its safetensors files.

        Args:
            path: a folder, an index or a file.
            layer: its number in the names of tensors.
            options: of `megamoe_jit.checkpoints.layer_from_checkpoint`, of which `max_tokens` must be there.

        Returns:
            The layer.

        Raises:
            ConfigError: the experts cannot be this layer; says why.
            CheckpointError: a file is not there, damaged, or does not hold what the index says.
            UnsupportedDeviceError: there is no such GPU, or it is no Hopper GPU.
            ToolchainError: the package safetensors is not installed.
        """
        above: Any = importlib.import_module("megamoe_jit.checkpoints")  # by its name: rooms below must not need it
        made: MegaMoE = above.layer_from_checkpoint(path, layer, **options)
        return made

    @property
    def buffer(self) -> SymmBuffer:
        """What calls are staged in, which other layers may use too: a `SymmBuffer`, or a `MultiNodeBuffer`."""
        return self._lease.buffer  # type: ignore[no-any-return]

    @property
    def l1(self) -> WeightTensors:
        """The tensors of `w13` in the kernel's order: codes and scales; of MXFP4 codes, exponents and scales."""
        return tuple(getattr(self, name) for name in self._names[0])

    @property
    def l2(self) -> WeightTensors:
        """The same of `w2`."""
        return tuple(getattr(self, name) for name in self._names[1])

    def stage(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> int:
        """Quantise and copy the inputs of a call into the buffer, once the last call has read its own.

        Args:
            x: bf16, float16 or float32 ``[T, hidden]``, T at most the capacity.
            topk_idx: int64 or int32 ``[T, topk]``, -1 for a masked slot.
            topk_weights: bf16, float16 or float32 ``[T, topk]``.

        Returns:
            T, the number of tokens.

        Raises:
            ConfigError: a shape, dtype, device or number of tokens is not supported, or the layer was destroyed.
            DeviceFaultError: an earlier call failed.
        """
        if self._spread:
            return int(self._lease.buffer.stage(x, topk_idx, topk_weights))
        return stage(self.buffer, x, topk_idx, topk_weights)

    def forward(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, padded_tokens: int | None = None
    ) -> torch.Tensor:
        """Run the layer: what calling it does.

        Args:
            x: bf16, float16 or float32 ``[T, hidden]``.
            topk_idx: int64 or int32 ``[T, topk]``, -1 for a masked slot.
            topk_weights: bf16, float16 or float32 ``[T, topk]``.
            padded_tokens: with a topology: rows of each rank in this call, the same on all ranks, T to `max_tokens`,
                which it is by default.

        Returns:
            bf16 ``[T, hidden]``, a new tensor; the kernel may still be running.

        Raises:
            ConfigError: an argument is not supported, or the layer was destroyed; nothing was launched.
            CaptureError: first use of this kernel during CUDA-graph capture.
            DeviceFaultError: an earlier call failed.
            MegaMoeError: the kernel could not be compiled, loaded or launched; see `fp8_mega_moe`.
        """
        if self._spread or padded_tokens is not None:
            return self._serve_spread((x, topk_idx, topk_weights), padded_tokens)
        if _operators.is_traced():
            options = self._workspace, self.clamp, self.fast_math, self.shared_weight
            weights, exponents = _operators.as_arguments(self.l1, self.l2)
            made: torch.Tensor = torch.ops.megamoe_jit.moe(x, topk_idx, topk_weights, *weights, *options, *exponents)
            return made
        buffer, held = self._lease.held or self.buffer, self._buffers.__getitem__  # at once: the host's time counts
        l1: Any = tuple(map(held, self._names[0]))
        l2: Any = tuple(map(held, self._names[1]))
        return serve(buffer, x, topk_idx, topk_weights, l1, l2, self.clamp, self.fast_math, self.shared_weight)

    def _serve_spread(self, batch: tuple[torch.Tensor, ...], padded_tokens: int | None) -> torch.Tensor:
        """`forward` with a topology, and with rows that a layer without one does not know."""
        if not self._spread:
            raise ConfigError(f"padded_tokens = {shown(padded_tokens)} without a topology; allowed: None")
        if _operators.is_traced():
            raise ConfigError("a layer with a topology was traced; allowed: eager calls, and CUDA graphs of them")
        y: torch.Tensor = self._lease.serve(*batch, self.l1, self.l2, self.clamp, self.fast_math, padded_tokens)
        return y

    def load_weights(
        self,
        w13: torch.Tensor | WeightTensors,
        w2: torch.Tensor | WeightTensors,
        shared_w13: torch.Tensor | WeightTensors | None = None,
        shared_w2: torch.Tensor | WeightTensors | None = None,
    ) -> None:
        """Write other weights over the layer's: addresses stay, so that captured graphs read the new ones.

        Calls that were launched before read the old weights, calls after this the new ones; replays of graphs are for
        the caller to order. Values are quantised on the layer's device. One expert at a time is brought there.

        Args:
            w13: as the layer was made of, values or a pair, of the same shape, without shared experts; on any device.
            w2: likewise.
            shared_w13: the same of shared experts; None leaves them as they are.
            shared_w2: likewise.

        Raises:
            ConfigError: a shape or dtype does not fit, or the weights are transformed already; nothing was written.
            CaptureError: the current stream is capturing a CUDA graph.
        """
        shared = {"shared_w13": shared_w13, "shared_w2": shared_w2}
        changed = {"w13": w13, "w2": w2, **{name: given for name, given in shared.items() if given is not None}}
        known = {matrix.name: (matrix, held) for matrix, held in self._parts()}
        for name, weights in changed.items():
            if name not in known:
                raise ConfigError(f"{name} was given; allowed: None, the layer has no shared experts")
            check_same(name, weights, known[name][1], self._rounded)
        for name, weights in changed.items():
            matrix, held = known[name]
            self._write(matrix, weights, held)

    def __deepcopy__(self, memo: dict[int, Any]) -> MegaMoE:
        """A layer with weights of its own, in the same workspace; with a buffer of its own if this one has one."""
        refuse_capture("a layer cannot be copied", "copy it before the capture")
        made = object.__new__(type(self))
        made.__dict__["_lease"] = self._lease.again()
        memo[id(self)] = made
        try:
            buffers = {name: tensor for name, tensor in self._buffers.items() if name not in self._held}
            state: dict[str, Any] = self.__getstate__()  # type: ignore[no-untyped-call]  # without what was compiled for this one
            more = {name: value for name, value in state.items() if name not in ("_lease", "_buffers")}
            made.__dict__.update(copy.deepcopy({**more, "_buffers": buffers}, memo))
            made._workspace = made._lease.name
            made._buffers.update({name: getattr(self, name).clone() for name in self._held})
            mark_transformed(made.l1, made.l2)
        except BaseException:
            made._lease.release()
            raise
        return made

    def extra_repr(self) -> str:
        """What `repr` says of the layer."""
        lease, shape = self._lease, self._lease.shape
        sizes = f"experts={shape.experts}, hidden={shape.hidden}, intermediate={shape.intermediate}, topk={shape.topk}"
        if self.weight_format != FP8.name:
            sizes += f", weight_format={self.weight_format}"
        if shape.shared:
            sizes += f", num_shared_experts={shape.shared}, shared_weight={self.shared_weight}"
        options = f"clamp={self.clamp}, fast_math={self.fast_math}, device={self.l1_codes.device}"
        return f"{sizes}, capacity={lease.capacity}, {options}, workspace={lease.kind}"

    def check(self) -> None:
        """Wait for the device and raise if a kernel of this layer, or of another one in its workspace, gave up.

        Raises:
            ConfigError: the layer was destroyed, and others still use its workspace.
            DeviceFaultError: a wait inside a kernel passed its deadline, or the CUDA context is broken.
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing is wrong.
        """
        self.buffer.check()

    def destroy(self) -> None:
        """Give the workspace up; the last of the layers in it waits for the device and gives the memory back.

        Safe to call twice. A buffer that was given stays as it is.

        Raises:
            CaptureError: some stream is capturing, so that the device cannot be waited for; nothing was given back.
        """
        self._lease.release()
