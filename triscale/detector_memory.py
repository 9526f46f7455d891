"""Peak memory of a detector's forward pass and of its training step, by the replay that memory_model uses for networks.

Followed call by call: detect/retinanet.py channels-last, detect/losses.py under mmdetection's rules, torchvision's box_iou and
sigmoid_focal_loss. What counts and what doesn't is as in memory_model; the outputs are let go before the backward pass. Held against
the live storages of real steps in tests/test_detect_memory.py.
"""

from __future__ import annotations

from triscale.architecture import Numerics
from triscale.detector import DetectorArch, detector_cost
from triscale.memory_model import Memory
from triscale.replay import Replay, Value

# As retinanet.NUMERICS: of pyramid and heads, whatever the backbone's.
NUMERICS = Numerics(padding="symmetric", activation="relu")


def detector_memory(
    arch: DetectorArch, num_classes: int, batch: int = 1, *, boxes: int = 16, resolution: int | tuple[int, int] | None = None
) -> Memory:
    """Bytes in float32 for `batch` images of (height, width), the backbone's own resolution unless given, 3 channels.

    boxes: in each image; the overlaps of all anchors with them are the only thing that they change. Inference is the forward pass, before
    any box is chosen. Raises ValueError for less than one class or image, or fewer than no boxes.
    """
    if batch < 1 or boxes < 0:
        raise ValueError(f"detector_memory: expected batch >= 1 and boxes >= 0, found {batch} and {boxes}")
    size = (resolution, resolution) if isinstance(resolution, int) else resolution or (arch.backbone.resolution,) * 2
    params = detector_cost(arch, num_classes, size).params
    peaks = []
    for training in (False, True):
        r = _DetectorReplay(batch, arch.backbone.numerics, training)
        images = r.value((3, *size))
        images.needs_grad = False
        r.peak = 0
        outputs = r.forward(arch, num_classes, images)
        if training:
            r.step(arch, num_classes, boxes, outputs)
        peaks.append(r.peak - images.size)
    return Memory(4 * params, 4 * images.size, 4 * peaks[0], 4 * peaks[1])


class _DetectorReplay(Replay):
    def forward(self, arch: DetectorArch, num_classes: int, images: Value) -> tuple[list[Value], list[Value]]:
        """Each level's logits and deltas."""
        taps = self.stages(arch, images)
        self.follow(NUMERICS)
        maps = self.pyramid(arch, [taps[stride] for stride, _ in arch.laterals])
        each = arch.anchors.each
        outputs = [self.tower(arch, maps, each * num_classes), self.tower(arch, maps, each * 4)]
        self.let_go(*(x.storage for x in (*taps.values(), *maps)))
        return outputs[0], outputs[1]

    def stages(self, arch: DetectorArch, images: Value) -> dict[int, Value]:
        """ConvNet.stages: each stride's deepest map stays."""
        net = arch.trunk
        stride, taps = net.stem.stride, {}
        x, pooled = self.stem(net.stem, images)
        if pooled is not None:
            taps[stride] = x
            x, stride = pooled, 2 * stride
        stage = 0
        for block in net.blocks():
            if block.stage_index > stage:
                self._tap(taps, stride, x)
                stage = block.stage_index
            y = self.block(block, x)
            self.drop(x.storage)
            x, stride = y, stride * block.stride
        self._tap(taps, stride, x)
        self.drop(x.storage)
        return taps

    def _tap(self, taps: dict[int, Value], stride: int, x: Value) -> None:
        if stride in taps:
            self.drop(taps[stride].storage)
        x.storage[1] += 1
        taps[stride] = x

    def pyramid(self, arch: DetectorArch, maps: list[Value]) -> list[Value]:
        p = arch.pyramid

        def output(x: Value, stride: int) -> Value:
            if p.norm:
                return self.conv_norm_act(x, p.channels, 3, stride, act=False)
            return self.convolve(x, p.channels, 3, stride, (9 * x.shape[0] + 1) * p.channels)

        sums = [self.convolve(x, p.channels, 1, 1, (x.shape[0] + 1) * p.channels) for x in maps]
        for i in reversed(range(len(sums) - 1)):
            doubled = self.value(sums[i].shape)
            self.node(doubled, [(sums[i + 1], False)], [])
            total = self.value(sums[i].shape)
            self.node(total, [(sums[i], True), (doubled, True)], [])
            self.drop(doubled.storage)
            self.drop(sums[i].storage)
            sums[i] = total
        out = [output(x, 1) for x in sums]
        x = maps[-1] if p.extra == "backbone" else out[-1]
        x.storage[1] += 1
        for _ in p.strides[len(maps) :]:
            out.append(output(x, 2))
            self.drop(x.storage)
            x = self.value(out[-1].shape)  # its ReLU, not in place
            self.node(x, [(out[-1], False)], [x.storage])
        self.let_go(*(x.storage for x in (x, *sums)))
        return out

    def tower(self, arch: DetectorArch, maps: list[Value], outputs: int) -> list[Value]:
        head, out = arch.head, []
        for level, x in enumerate(maps):
            shared = level < len(maps) - 1
            x.storage[1] += 1
            for _ in range(head.convs):
                weights = (9 * x.shape[0] + (not head.norm)) * head.channels
                y = self.convolve(x, head.channels, 3, 1, weights, shared=shared)
                self.drop(x.storage)
                x = self.act(self.norm(y) if head.norm else y)
            out.append(self.convolve(x, outputs, 3, 1, (9 * x.shape[0] + 1) * outputs, shared=shared))
            self.drop(x.storage)
        return out

    # The losses.
    def flat(self, elements: int, inputs: list[tuple[Value, bool]], saved: list[list[int]], *, temporary: int = 0, keeps: bool = False) -> Value:
        """An operator's result of so many elements in all. keeps: it is saved itself."""
        out = Value(self.new(elements), (1, 1, elements), elements)
        self.node(out, inputs, [*saved, out.storage] if keeps else saved, temporary=temporary)
        return out

    def let_go(self, *storages: list[int]) -> None:
        for storage in storages:
            self.drop(storage)

    def step(self, arch: DetectorArch, num_classes: int, boxes: int, outputs: tuple[list[Value], list[Value]]) -> None:
        """Losses and backward. Takes the outputs over."""
        anchors = sum(arch.anchors.each * x.shape[1] * x.shape[2] for x in outputs[0])
        # Flat, the levels' outputs are views; joined, their gradients are views of one storage.
        joined = [self.flat(sum(x.size for x in part), [(x, True) for x in part], []) for part in outputs]
        self.new(4 * anchors)  # kept by cached_anchors
        all_anchors = self.new(4 * anchors)
        logits, deltas = ([Value(x.storage, x.shape, x.size // self.batch) for _ in range(self.batch)] for x in joined)
        for whole, parts in zip(joined, (logits, deltas), strict=True):
            self.unbind(whole, parts)
        ends = []
        for x, d in zip(logits, deltas, strict=True):
            matched = self.assign(anchors, boxes)
            ends.append(self.focal(x, anchors * num_classes))
            ends.append(self.flat(0, [(d, False)], [], temporary=d.size))  # the positive anchors' few
            self.drop(matched)
        self.let_go(all_anchors, *(x.storage for part in (joined, *outputs) for x in part))
        for end in ends:
            end.grad = self.new(0)
        self.backward()

    def unbind(self, whole: Value, parts: list[Value]) -> None:
        """The batch as its images. Backward stacks their gradients."""

        def backward() -> None:
            whole.grad = self.new(whole.size)
            for part in parts:
                if part.grad is not None:
                    self.drop(part.grad)

        self.nodes.append(backward)

    def assign(self, anchors: int, boxes: int) -> list[int]:
        """The anchors' boxes as int64. At its height box_iou holds two corners, their difference, intersection, sum and union."""
        self.drop(self.new(9 * boxes * anchors))
        return self.new(2 * anchors)

    def focal(self, x: Value, size: int) -> Value:
        """torchvision's sigmoid_focal_loss on an image's `size` logits, operator by operator. The targets take no gradient."""
        wanted = self.new(size)
        p = self.flat(size, [(x, False)], [], keeps=True)
        entropy = self.flat(size, [(x, False)], [x.storage, wanted], temporary=size)
        hit = self.flat(size, [(p, False)], [wanted])
        miss, unwanted = self.flat(size, [(p, False)], []), self.new(size)
        off = self.flat(size, [(miss, False)], [unwanted])
        self.let_go(miss.storage, unwanted)
        right = self.flat(size, [(hit, True), (off, True)], [])
        self.let_go(hit.storage, off.storage)
        wrong = self.flat(size, [(right, False)], [])
        modulation = self.flat(size, [(wrong, False)], [wrong.storage], temporary=2 * size)
        loss = self.flat(size, [(entropy, False), (modulation, False)], [entropy.storage, modulation.storage])
        self.let_go(wrong.storage, modulation.storage)
        alpha = self.new(size)
        self.drop(self.new(2 * size))  # the sum's terms
        weighted = self.flat(size, [(loss, False)], [alpha])
        self.let_go(loss.storage)
        total = self.flat(0, [(weighted, True)], [])
        self.let_go(weighted.storage, alpha, right.storage, entropy.storage, p.storage, wanted)
        return total
