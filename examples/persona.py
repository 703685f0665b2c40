# %% [markdown]
# # A chatbot with a persona, in deep prompts
#
# Keys and values of sixteen imaginary tokens stand before every text, in each block of the model (PEFT's prefix
# tuning). They are all that trains. Servers are sent a block's part by its hash, and not again while it is the same.
#
# The persona is that of the chatterbot-corpus package: a program that knows it is one.

# %%
import torch
from peft import PrefixTuningConfig, get_peft_model
from run import CONSOLE, Place, batch_of, parts_of, read_options, train
from texts import persona

options = read_options("Give a chatbot a persona.", steps=120, rate=1e-2, out="persona")
options.held_out = min(options.held_out, 48)
place = Place(options)
model, tokenizer = place.model, place.tokenizer
exchanges, held_out = persona(options.data, options.held_out)
CONSOLE.print(f"{len(exchanges)} exchanges to learn from, {len(held_out)} to measure with")


# %% [markdown]
# ## Talking
#
# The loss, and the accuracy, are those of the answers' tokens alone.


# %%
def asked(question):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )


def encode(some):
    asked_ids = [tokenizer.encode(asked(one.question), add_special_tokens=False) for one in some]
    answer_ids = [
        [*tokenizer.encode(one.answer[:200], add_special_tokens=False), tokenizer.eos_token_id] for one in some
    ]
    encoded = tokenizer.pad(
        {"input_ids": [first + second for first, second in zip(asked_ids, answer_ids, strict=True)]},
        return_tensors="pt",
    )
    is_answer = torch.zeros_like(encoded.input_ids, dtype=torch.bool)
    for row, ids in zip(is_answer, answer_ids, strict=True):
        row[-len(ids) :] = True
    return encoded, is_answer


def answer_logits(some):
    encoded, is_answer = encode(some)
    longest = int(is_answer.sum(1).max())
    logits = model(**encoded, logits_to_keep=longest + 1).logits[:, -longest - 1 : -1]
    kept = is_answer[:, -longest:]
    return logits[kept], encoded.input_ids[:, -longest:][kept]


@torch.no_grad()
def accuracy(about):
    model.eval()
    right, count = 0, 0
    for some in parts_of(held_out, 16, about):
        logits, ids = answer_logits(some)
        right += int((logits.argmax(1) == ids).sum())
        count += len(ids)
    return right / count


def say(question):
    encoded = tokenizer(asked(question), return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
    said = model.generate(**encoded, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(said[0, encoded.input_ids.shape[1] :], skip_special_tokens=True).strip()


QUESTIONS = ("What can you eat?", "Are you a human?", "Where are you?")
before = accuracy("before")
said_before = [say(question) for question in QUESTIONS]

# %% [markdown]
# ## Training

# %%
model = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16))


def loss_of(step):
    logits, ids = answer_logits(batch_of(exchanges, step, options.batch))
    return torch.nn.functional.cross_entropy(logits, ids)


training = train(model, loss_of, options)

# %%
if training.step == options.steps:
    after = accuracy("after")
    model.save_pretrained(options.out / "adapter")
    for question, old in zip(QUESTIONS, said_before, strict=True):
        CONSOLE.print(f"\n{question}\n  before: {old}\n  after:  {say(question)}", markup=False)
    CONSOLE.print(f"\naccuracy before: {before:.3f}, after {training.step} steps: {after:.3f}")
    CONSOLE.print(f"adapter, for PEFT anywhere: {options.out / 'adapter'}")
place.close()
