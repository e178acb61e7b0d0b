"""The classifier against torchvision's ResNet, and on other people's bodies."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from resnext_backbones import TorchvisionBody, UsageError, freeze, load_weights, resnet18
from tasks.models.classifier import Classifier


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """torchvision's ResNet-18 of seven classes, and its weights as a file under its own names."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7).eval()
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(theirs.state_dict(), file)
    return theirs, file


def pixels(n=2):
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8)


def test_published_classifiers_load_with_their_last_layer(published):
    theirs, file = published
    ours = Classifier(resnet18(), 7).eval()
    receipt = load_weights(ours, file)
    assert "fc" in receipt.stages
    x = ours.normalise(pixels())
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_published_classifiers_load_without_a_last_layer_of_other_classes(published):
    theirs, file = published
    ours = Classifier(resnet18(), 3)
    with pytest.raises(UsageError, match=r"fc\.weight"):
        load_weights(ours, file)
    load_weights(ours, file, allow_partial=("fc",))
    assert torch.equal(ours.body.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)


def test_images_are_normalised_as_torchvision_does():
    images = pixels()
    preset = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(
        Classifier(resnet18(), 3).normalise(images), preset(images / 255), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("body", [resnet18, lambda: TorchvisionBody("mobilenet_v3_small")])
def test_every_parameter_trains(body):
    torch.manual_seed(0)
    model = Classifier(body(), 4, dropout=0.2).train()
    logits = model(model.normalise(pixels()))
    assert logits.shape == (2, 4)
    nn.functional.cross_entropy(logits, torch.tensor([0, 3])).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_dropout_is_of_training_only():
    torch.manual_seed(0)
    model = Classifier(resnet18(), 4, dropout=0.5)
    x = model.normalise(pixels())
    model.train().body.eval()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_logits_are_float32_under_autocast():
    model = Classifier(resnet18(), 4).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(model.normalise(pixels(1))).dtype == torch.float32


def test_stages_freeze_as_the_bodys():
    model = Classifier(resnet18(), 4)
    freeze(model, at=2)
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "layer1"}


def test_a_body_with_a_classifier_of_its_own_is_refused():
    with pytest.raises(UsageError, match=r"leave out backbone\.num_classes"):
        Classifier(resnet18(num_classes=10), 4)
