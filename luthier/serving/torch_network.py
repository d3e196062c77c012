"""A trained model that torch runs."""

import threading

import torch
from torch import nn

from luthier.familiarity import load_familiarity, none_of, threshold_of
from luthier.fusion import fuse_batchnorm
from luthier.images.views import EvaluationView
from luthier.machine import configure_logging, keep_freed_memory, lacking_capability
from luthier.serving.network import Rated
from models import check_view, labels_of, load_trained


class TorchNetwork:
    """A saved model on the accelerator, or on the CPU where there is none. See `network.Network`.

    Args:
        model_name: a folder with a saved model, or a name on the Hub.

    Raises:
        ModelError: the model, its config or its familiarity file cannot be loaded or is damaged, or the model does not
            take what its image processor makes.
        UserError: its image processor is of no use, see `views.view_size`.
    """

    def __init__(self, model_name: str):
        configure_logging()
        torch.get_num_threads()  # so that this thread keeps its own; see `machine.pool_of_single_threads`
        usable = torch.accelerator.is_available() and not lacking_capability()
        accelerator = torch.accelerator.current_accelerator() if usable else None
        self.device = accelerator or torch.device("cpu")
        if accelerator is None:
            keep_freed_memory()
        self.batch_size = 64 if accelerator else 16
        model, image_processor = load_trained(model_name)
        self.view = EvaluationView(image_processor)
        check_view(model, self.view.size)  # on the CPU: a GPU would hold a copy, and plan for a batch of one
        model.to(self.device)  # type: ignore[arg-type]  # the library wraps torch's method
        self.model = fuse_batchnorm(model, self.view.size)
        self.labels, self.none = labels_of(model), none_of(model)
        self.familiarity = load_familiarity(model, model_name)
        self.unsure_below = threshold_of(model, self.familiarity)
        self._turn = threading.Lock()  # the app answers several people at once
        self.head: nn.Module = nn.Identity()  # makes logits of what the model returns
        if self.familiarity:
            # Without its head the model returns features of [N, F], as they are stored. What enters the head may have
            # another axis: the ResNets of CLIP apply it to all tokens, and take the first one's afterwards.
            self.head = self.model.get_submodule(self.familiarity.head)
            self.model.set_submodule(self.familiarity.head, nn.Identity())
            # Converted once: with many classes it may have more numbers than the model.
            self._rate = self.familiarity._replace(bank=self.familiarity.bank.to(self.device, torch.float32)).rate

    def start_worker(self) -> None:
        """Give a thread that prepares images one thread of torch: all together keep the cores busy."""
        torch.set_num_threads(1)

    @torch.inference_mode()
    def rate(self, views: list[torch.Tensor]) -> Rated:
        """Return what the model says of N views."""
        pixel_values = torch.stack(views).to(self.device, memory_format=torch.channels_last)
        with self._turn:
            output = self.model(pixel_values=pixel_values).logits
        probabilities = self.head(output).float().softmax(dim=-1)
        sureness = self._rate(probabilities, output) if self.familiarity else probabilities.amax(dim=-1)
        return Rated(probabilities.cpu().numpy(), sureness.cpu().numpy())
