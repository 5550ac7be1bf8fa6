"""What is alive in a worker of vLLM, which takes this class as its `worker_extension_cls`."""

import gc

import torch

from recontrol.vllm_plugin.steering import RequestControls


class Census:
    """Asked for by name through the server's `/collective_rpc`; in a server with one worker it is in the engine's process."""

    def census(self):
        """The objects that the garbage collector knows, the tensors among them, and the requests whose control is kept."""
        gc.collect()
        objects = gc.get_objects()
        return {
            "objects": len(objects),
            "tensors": sum(issubclass(type(each), torch.Tensor) for each in objects),
            "controls": sum(len(each) for each in objects if type(each) is RequestControls),
        }
