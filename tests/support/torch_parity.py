"""Our arrays and gradients against a torch model's."""

import numpy as np
import torch

from tests.support.compare import close_in_scale
from tests.support.released import by_their_names
from vlm_jax.zoo import recognize


def close(got, want, tolerance=1e-5):
    """`close_in_scale` of arrays or tensors."""
    close_in_scale(got, want.detach().numpy() if isinstance(want, torch.Tensor) else want, tolerance)


def gradients_like(theirs, logits, sigmoid):
    """Leaves the gradients of the contrastive loss of `logits` in the model there."""
    if sigmoid:
        signs = 2 * torch.eye(len(logits)) - 1
        loss = -torch.nn.functional.logsigmoid(signs * logits).sum() / len(logits)
    else:
        labels = torch.arange(len(logits))
        cross = torch.nn.functional.cross_entropy
        loss = (cross(logits, labels) + cross(logits.T, labels)) / 2
    loss.backward()


def same_gradients(theirs, grads, released, folder, tolerance=1e-5):
    """Ours, put into their layout by the key table, equal theirs (saved as if they were the parameters)."""
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(folder)
    theirs = recognize.understand(folder).tensors
    found = by_their_names(released, grads)
    assert max(np.abs(array).max() for array in found.values()) > 1e-2
    for name, array in found.items():
        np.testing.assert_allclose(array, theirs[name].read(), rtol=tolerance, atol=tolerance, err_msg=name)
