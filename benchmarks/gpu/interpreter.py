"""Triton's interpreter on a numpy that it doesn't fit: Triton 3.6 turns one-element arrays into numbers as numpy allows up to 2.3."""


def mend():
    """A loop's bounds are numbers again, where Triton's interpreter would raise "only 0-dimensional arrays can be converted". Harmless elsewhere.

    Before a kernel first runs interpreted. Does nothing where Triton isn't installed, or has another interpreter.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = getattr(interpreter, "_patch_lang_tensor", None)
    if patch is None or getattr(patch, "mended", False):
        return

    def mended(tensor, *more):
        patch(tensor, *more)
        scope = more[0] if more else None  # since 3.6 what is patched is undone after each launch
        put = scope.set_attr if hasattr(scope, "set_attr") else setattr
        put(tensor, "__index__", lambda self: self.handle.data.item())

    mended.mended = True
    interpreter._patch_lang_tensor = mended
