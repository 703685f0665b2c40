# %% [markdown]
# # Is a film review good? Learned through a swarm
#
# The model's blocks are on servers; what trains is here: soft prompts, which stand before every text
# (`--method prompt`), or LoRA matrices, which are added to layers of the remote blocks (`--method lora`). Both are
# PEFT's own, and so is what is saved in the end.
#
# The texts are 10,605 sentences of film reviews that people have rated, from the source package of vaderSentiment.
# The model is asked to go on after `Review: ... Sentiment:`, and the likelier one of two words is its answer.

# %%
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from run import CONSOLE, Place, batch_of, parts_of, read_options, train
from texts import film_reviews

options = read_options(
    "Learn the sentiment of film reviews.", choices=("lora", "prompt"), steps=150, rate=2e-3, out="sentiment"
)
options.out = options.out / options.method
place = Place(options)
model, tokenizer = place.model, place.tokenizer
reviews, held_out = film_reviews(options.data, options.held_out)
CONSOLE.print(f"{len(reviews):,} sentences to learn from, {len(held_out):,} to measure with")


# %% [markdown]
# ## Asking
#
# Only the last position's logits are wanted, so the head multiplies once a text. Padding is on the left, so that the
# last position is the same for all.

# %%
PROMPT = "Review: {}\nSentiment:"
words = (tokenizer.encode(word, add_special_tokens=False) for word in (" negative", " positive"))
choice = torch.tensor(next(pair for pair in zip(*words, strict=False) if pair[0] != pair[1]))


def answers(texts):
    encoded = tokenizer(
        [PROMPT.format(text[:300]) for text in texts], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    return model(**encoded, logits_to_keep=1).logits[:, -1, choice]


@torch.no_grad()
def accuracy(about):
    model.eval()
    right = 0
    for some in parts_of(held_out, 32, about):
        right += int((answers([review.text for review in some]).argmax(1) == labels(some)).sum())
    return right / len(held_out)


def labels(some):
    return torch.tensor([review.is_good for review in some]).long()


before = accuracy("before")

# %% [markdown]
# ## Training
#
# The optimiser and its state never leave this machine; servers see activations and, with LoRA, its matrices.

# %%
if options.method == "lora":
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
else:
    config = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=16,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Say whether the review of a film is positive or negative.",
        tokenizer_name_or_path=tokenizer.name_or_path,
    )
model = get_peft_model(model, config)


def loss_of(step):
    some = batch_of(reviews, step, options.batch)
    return torch.nn.functional.cross_entropy(answers([review.text for review in some]), labels(some))


training = train(model, loss_of, options)

# %%
if training.step == options.steps:
    after = accuracy("after")
    model.save_pretrained(options.out / "adapter")
    CONSOLE.print(f"accuracy before: {before:.3f}, after {training.step} steps: {after:.3f}")
    CONSOLE.print(f"adapter, for PEFT anywhere: {options.out / 'adapter'}")
place.close()
