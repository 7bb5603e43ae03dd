"""A torch tensor over any address, through DLPack: torch takes the device from us and asks nobody about the address.

`torch.frombuffer` does it for the host's memory alone. The structures are those of dlpack.h.
"""

import ctypes

import torch
from torch import Tensor

_CPU, _CUDA = 1, 2  # DLDeviceType
_UNSIGNED = 1  # DLDataTypeCode


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("ordinal", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: dense
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_alive: dict[int, tuple[object, ...]] = {}  # address of a managed tensor -> what must live as long as torch uses it


def _forget(managed: int) -> None:
    _alive.pop(managed, None)


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_deleter))  # the last tensors may go after this module has
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def bytes_at(address: int, num_bytes: int, device: torch.device, owner: object) -> Tensor:
    """[num_bytes] uint8 over an address of `device`; keeps `owner` alive as long as the tensor and its views."""
    shape = (ctypes.c_int64 * 1)(num_bytes)
    kind = _Device(_CUDA if device.type == "cuda" else _CPU, device.index or 0)
    tensor = _Tensor(address, kind, 1, _DataType(_UNSIGNED, 8, 1), shape, None, 0)
    managed = _ManagedTensor(tensor, None, ctypes.cast(_deleter, ctypes.c_void_p))
    at = ctypes.addressof(managed)
    _alive[at] = (managed, shape, owner)
    try:
        result: Tensor = torch.utils.dlpack.from_dlpack(_new_capsule(at, b"dltensor", None))
    except BaseException:
        del _alive[at]
        raise
    return result
