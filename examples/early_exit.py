# %% [markdown]
# # Half of the model, with a module of one's own in the middle
#
# `model.blocks[a:b]` is a module of torch like any other. Here texts go through the first quarter of the blocks, then
# through a small network of ours, then through the next quarter; and there they leave, for a classifier. Servers of the
# other half are never asked. Gradients come back through the second quarter to what stands before it.

# %%
import torch
from run import CONSOLE, Place, batch_of, parts_of, read_options, train
from safetensors.torch import save_model
from texts import film_reviews
from torch import nn

options = read_options("Leave a model early, with a module in its middle.", steps=150, rate=2e-3, out="early-exit")
if options.local:
    raise SystemExit("this example is about blocks that are elsewhere; leave --local out")
place = Place(options)
model, tokenizer = place.model, place.tokenizer
reviews, held_out = film_reviews(options.data, options.held_out)
count = len(model.blocks)
quarter, half = count // 4, count // 2


# %%
class Detour(nn.Module):
    """A narrow network beside the path, and where the path ends: a classifier of the last token."""

    def __init__(self, width, inner=32):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.classify = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2))
        nn.init.zeros_(self.up.weight)  # at first nothing is added
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden):
        """Add to the hidden states on their way."""
        return hidden + self.up(torch.relu(self.down(hidden)))


detour = Detour(model.config.hidden_size)


def answers(texts):
    encoded = tokenizer([text[:300] for text in texts], return_tensors="pt", padding=True)
    mask = encoded.attention_mask
    hidden = model.get_input_embeddings()(encoded.input_ids).detach()
    hidden = model.blocks[:quarter](hidden, mask)
    hidden = model.blocks[quarter:half](detour(hidden), mask)
    return detour.classify(hidden[:, -1])


def labels(some):
    return torch.tensor([review.is_good for review in some]).long()


@torch.no_grad()
def accuracy(about):
    right = 0
    for some in parts_of(held_out, 32, about):
        right += int((answers([review.text for review in some]).argmax(1) == labels(some)).sum())
    return right / len(held_out)


before = accuracy("before")


# %%
def loss_of(step):
    some = batch_of(reviews, step, options.batch)
    return nn.functional.cross_entropy(answers([review.text for review in some]), labels(some))


training = train(detour, loss_of, options)

# %%
if training.step == options.steps:
    after = accuracy("after")
    save_model(detour, str(options.out / "detour.safetensors"))
    CONSOLE.print(f"through {half} of {count} blocks")
    CONSOLE.print(f"accuracy before: {before:.3f}, after {training.step} steps: {after:.3f}")
place.close()
