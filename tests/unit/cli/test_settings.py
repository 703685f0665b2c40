import pytest

from corolla.cli.config import ChatConfig, OutputConfig
from corolla.cli.settings import (
    Given,
    Setting,
    field_of,
    hint_of,
    load_settings,
    parse_bytes,
    write_file,
)
from corolla.errors import ConfigError
from corolla.hub import HubConfig
from corolla.server import ServerConfig
from corolla.terms import Span

LIGHT = ("chat", "hub", "output")


def load(*, file=None, flags=(), **environment):
    return load_settings(LIGHT, file=file, flags=flags, environment=environment)


def origin(settings, key):
    return next(setting.origin for setting in settings.all if setting.key == key)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "corolla.toml"
    path.write_text('[chat]\ntop_k = 5\nseed = 1\nthreads = 1\n[hub]\nmax_disk_bytes = "2GiB"\n')
    return path


def test_flags_overrule_the_environment_which_overrules_the_file_which_overrules_defaults(file):
    flag = Given("chat.threads", "3", "flag --threads", is_text=True)
    settings = load(file=file, flags=[flag], COROLLA_CHAT_SEED="2", COROLLA_CHAT_THREADS="2")
    chat = settings.get(ChatConfig)
    assert (chat.max_new_tokens, chat.top_k, chat.seed, chat.threads) == (512, 5, 2, 3)
    assert origin(settings, "chat.max_new_tokens") == "default"
    assert origin(settings, "chat.top_k") == f"file {file}"
    assert origin(settings, "chat.seed") == "environment COROLLA_CHAT_SEED"
    assert origin(settings, "chat.threads") == "flag --threads"


def test_values_become_what_their_setting_takes(file):
    settings = load(
        file=file, COROLLA_CHAT_PEERS="tls://a:1, tls://b:2", COROLLA_OUTPUT_JSON="1", COROLLA_HUB_CACHE_DIR="~/x"
    )
    assert settings.get(HubConfig).max_disk_bytes == 2 * 2**30
    assert settings.get(HubConfig).cache_dir.is_absolute()
    assert settings.get(ChatConfig).peers == ("tls://a:1", "tls://b:2")
    assert settings.get(OutputConfig).json is True


def test_a_span_is_written_with_a_colon():
    settings = load_settings(("server",), environment={"COROLLA_SERVER_BLOCKS": "4:8", "COROLLA_SERVER_MODEL": "x"})
    assert settings.get(ServerConfig).blocks == Span(4, 8)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"COROLLA_CHAT_PEER": "x"}, r"COROLLA_CHAT_PEER; did you mean COROLLA_CHAT_PEERS\?"),
        ({"COROLLA_CHATS_SEED": "1"}, r"COROLLA_CHATS_SEED.*unknown section; did you mean COROLLA_CHAT\?"),
        ({"COROLLA_CHAT_TOP_K": "many"}, r"chat.top_k is 'many' \(environment COROLLA_CHAT_TOP_K\): Expected `int`"),
        ({"COROLLA_CHAT_TOP_K": ""}, r"chat.top_k is ''"),
        ({"COROLLA_OUTPUT_LOG_LEVEL": "loud"}, r"output.log_level is 'loud'.*Invalid enum value"),
        ({"COROLLA_HUB_MAX_DISK_BYTES": "2 gigs"}, r"2GiB, 500MB or 1048576, not '2 gigs'"),
    ],
)
def test_what_the_environment_cannot_mean_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        load(**environment)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[chat]\nseeds = 1", r"unknown setting chat.seeds; did you mean chat.seed\?"),
        ("[chats]\nseed = 1", r"unknown section \[chats\]; did you mean chat\?"),
        ("seed = 1", r"unknown section \[seed\]"),
        ("chat = 1", r"chat is a section; write \[chat\]"),
        ("[chat]\nseed = '1'", r"chat.seed is '1' \(file .*corolla.toml\): Expected `int`"),
        ("[chat]\ngreedy = 1", r"chat.greedy is 1"),
        ("[chat\n", r"is not valid TOML"),
    ],
)
def test_what_the_file_cannot_mean_is_refused_and_the_file_is_named(tmp_path, content, message):
    path = tmp_path / "corolla.toml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as raised:
        load(file=path)
    assert str(path) in str(raised.value)


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.toml cannot be read: No such file"):
        load(file=tmp_path / "nothing.toml")


def test_the_file_of_the_account_is_read_if_it_is_there(tmp_path, monkeypatch):
    from platformdirs import user_config_path

    path = user_config_path("corolla", appauthor=False) / "corolla.toml"
    path.parent.mkdir(parents=True)
    path.write_text("[chat]\nseed = 7")
    assert load().get(ChatConfig).seed == 7


def test_a_section_that_was_not_asked_for_is_left_alone(tmp_path):
    path = tmp_path / "corolla.toml"
    path.write_text("[demo]\nwhatever = 1")
    load(file=path, COROLLA_DEMO_WHATEVER="1")


def test_a_setting_without_default_must_be_given():
    with pytest.raises(ConfigError, match=r"server.model has no default.*COROLLA_SERVER_MODEL"):
        load_settings(("server",), environment={}).get(ServerConfig)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="greedy"):
        load(COROLLA_CHAT_GREEDY="1", COROLLA_CHAT_TEMPERATURE="0.5").get(ChatConfig)


def test_a_value_is_not_in_the_representation_and_a_secret_one_is_never_shown():
    secret = Setting("hub.token", "hunter2", "default", is_secret=True)
    assert "hunter2" not in repr(secret) + secret.shown
    assert Setting("hub.endpoint", "https://hub", "default").shown == "https://hub"


def test_a_written_file_gives_a_child_the_same_settings(tmp_path, file):
    settings = load(file=file, COROLLA_HUB_CACHE_DIR=str(tmp_path / 'a "b" ü'))
    write_file(tmp_path / "child.toml", settings, ("hub",))
    child = load(file=tmp_path / "child.toml")
    assert child.get(HubConfig) == settings.get(HubConfig)
    assert child.get(ChatConfig) == ChatConfig()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("2GiB", 2**31),
        ("1.5 KiB", 1536),
        ("500MB", 500_000_000),
        ("3kB", 3000),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2Gi", "2G", "-1", "1e9", "2 GiB!"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="number of bytes"):
        parse_bytes(text)


def test_fields_and_their_types_are_found_by_key():
    assert "port" in field_of("server.port").metadata["help"]
    assert hint_of("server.blocks") is Span
