"""The documents say what the code does: each setting, route, metric and error has its place."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepseek_api_compat import config, errors
from deepseek_api_compat.gateway import metrics, openapi
from deepseek_api_compat.models.catalogue import CATALOGUE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "deepseek_api_compat"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
EXAMPLE = ROOT / "config.example.toml"

SECTIONS: dict[str, type[config.Section]] = {
    "server": config.ServerSettings,
    "log": config.LogSettings,
    "network": config.NetworkSettings,
    "limits": config.LimitSettings,
    "models": config.ModelSettings,
    "models.limits": config.ModelLimitSettings,
    "models.engines": config.EngineSettings,
    "ledger": config.LedgerSettings,
    "prices": config.PriceSettings,
    "media": config.MediaSettings,
    "plugins": config.PluginSettings,
}
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# Hosts that a reader may be told of: the projects' own sites, this machine, and reserved names.
HOSTS = re.compile(
    r"localhost|127\.0\.0\.1|0\.0\.0\.0|(.+\.)?(example|example\.com|test)|192\.0\.2\.\d+|github\.com|pypi\.org"
    r"|huggingface\.co|(www\.)?modelscope\.cn|api\.(deepseek|openai)\.com|arxiv\.org|platform\.openai\.com"
    r"|keepachangelog\.com|semver\.org|(www\.)?apache\.org"
)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its code blocks."""
    return FENCE.sub("", read(page))


def sections(page: Path) -> dict[str, str]:
    """Text under each heading, up to the next one."""
    parts = HEADING.split(prose(page))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def settings() -> Iterator[tuple[str, msgspec.structs.FieldInfo]]:
    nested = set(SECTIONS)
    for section, struct in SECTIONS.items():
        for field in msgspec.structs.fields(struct):
            name = f"{section}.{field.name}"
            if name not in nested:
                yield name, field


def default_of(field: msgspec.structs.FieldInfo) -> str:
    """How the documents write a default: as TOML does."""
    value: Any = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    if value is msgspec.NODEFAULT:
        return "Required."
    if value is None:
        return "Default: not set."
    return f"Default: `{msgspec.json.encode(value).decode()}`"  # plain values look the same in JSON


@pytest.mark.parametrize("name", [name for name, _ in settings()])
def test_each_setting_has_a_heading_and_its_default(name: str) -> None:
    field = dict(settings())[name]
    found = sections(DOCS / "configuration.md")
    assert f"`{name}`" in found
    assert found[f"`{name}`"].lstrip().startswith(default_of(field))


def test_every_section_of_the_settings_is_walked() -> None:
    """A new section must be added to SECTIONS, or its settings would go undocumented."""
    tables = {field.name for field in msgspec.structs.fields(config.Settings)}
    assert tables == {name for name in SECTIONS if "." not in name}
    assert set(config.Section.__subclasses__()) == {*SECTIONS.values(), config.Settings}


def test_no_heading_for_a_setting_that_is_gone() -> None:
    headings = " ".join(sections(DOCS / "configuration.md"))
    tables = "|".join(name for name in SECTIONS if "." not in name)
    assert set(re.findall(rf"`((?:{tables})\.[\w.]+)`", headings)) == {name for name, _ in settings()}


def test_every_environment_variable_that_is_read_is_documented() -> None:
    """config.py and the client are the only readers; the prefixes are rules, not variables."""
    source = read(PACKAGE / "config.py") + read(PACKAGE / "client" / "openai.py")
    variables = set(re.findall(r'environ\.get\("([A-Z_]+)"\)', source))
    assert {"DEEPSEEK_CACHE_DIR", "DEEPSEEK_MASTER_KEY", "HF_ENDPOINT"} <= variables
    headings = sections(DOCS / "configuration.md")
    assert {name for name in variables if f"`{name}`" not in headings} == set()


def test_the_example_configuration_loads_and_names_everything() -> None:
    loaded = config.load(str(EXAMPLE), environ={})
    assert loaded.server == config.ServerSettings()
    assert loaded.limits == config.LimitSettings()
    assert loaded.models[0].name == config.DEFAULT_MODEL
    text = read(EXAMPLE)
    assert loaded.ledger == config.LedgerSettings()
    for name in SECTIONS:
        assert f"[{name}]" in text  # in one pair of brackets or two
    for name, field in settings():
        assert re.search(rf"^#? *{field.name} = ", text, re.MULTILINE), f"{name} is not in {EXAMPLE.name}"


def test_the_example_configuration_loads_with_its_comments_taken_away(tmp_path: Path) -> None:
    """What looks like a setting behind a `#` is one."""
    complete = tmp_path / "complete.toml"
    text = re.sub(r"^#(?= *[a-z\[][\w.\[\]]*($| =))", "", read(EXAMPLE), flags=re.MULTILINE)
    complete.write_text(text, encoding="utf-8")
    loaded = config.load(str(complete), environ={})
    kinds = {engine.kind for model in loaded.models for engine in model.engines}
    assert kinds == {"llamacpp", "vllm", "openai"}
    assert loaded.server.tls_cert


@pytest.mark.parametrize(("path", "method"), [operation[:2] for operation in openapi.OPERATIONS])
def test_each_route_has_a_heading(path: str, method: str) -> None:
    assert f"`{method.upper()} {path}`" in sections(DOCS / "api.md")


def metric_names() -> set[str]:
    ledger = metrics.LedgerCollector(problem=False, lag=0.0, pending=0, damaged=0)
    gauges = [metrics.PoolCollector([]), ledger, metrics.LimitsCollector(alone=False)]
    families = [*metrics._registry.collect(), *(family for one in gauges for family in one.collect())]
    return {family.name + ("_total" if family.type == "counter" else "") for family in families}


def test_each_metric_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(deepseek_\w+)` \|", read(DOCS / "api.md"), re.MULTILINE))
    assert "deepseek_requests_total" in documented
    assert documented == metric_names()


def api_errors(root: type[errors.ApiError] = errors.ApiError) -> Iterator[type[errors.ApiError]]:
    for found in root.__subclasses__():
        if found.__module__ == errors.__name__:
            yield found
            yield from api_errors(found)


@pytest.mark.parametrize("error", list(api_errors()))
def test_each_error_has_a_row_with_its_status_type_and_code(error: type[errors.ApiError]) -> None:
    row = re.search(rf"^\| `{error.__name__}` \|.*$", read(DOCS / "errors.md"), re.MULTILINE)
    assert row, f"{error.__name__} has no row"
    cells = [cell.strip() for cell in row[0].split("|")]
    assert cells[2:5] == [str(error.status), f"`{error.type}`", f"`{error.code}`" if error.code else "null"]


def test_codes_given_at_the_place_of_the_error_are_documented() -> None:
    codes = set()
    for source in PACKAGE.rglob("*.py"):
        codes |= set(re.findall(r'\bcode="(\w+)"', read(source)))
    assert "queue_full" in codes
    text = read(DOCS / "errors.md")
    assert {code for code in codes if f"`{code}`" not in text} == set()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the page's headings."""
    headings = HEADING.findall(prose(page))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_relative_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.name}: {link}")
    assert broken == []


def test_code_blocks_in_toml_and_python_parse() -> None:
    seen = set()
    for page in PAGES:
        for indent, language, code in FENCE.findall(read(page)):
            seen.add(language)
            code = re.sub(f"^{indent}", "", code, flags=re.MULTILINE)
            if language == "toml":
                tomllib.loads(code)
            elif language == "python":
                ast.parse(code)
    assert {"toml", "python", "bash"} <= seen


def test_configuration_blocks_are_accepted(tmp_path: Path) -> None:
    """Every TOML block is a configuration that the service would take."""
    for number, page in enumerate(PAGES):
        for indent, language, code in FENCE.findall(read(page)):
            if language == "toml":
                file = tmp_path / f"{number}.toml"
                file.write_text(re.sub(f"^{indent}", "", code, flags=re.MULTILINE), encoding="utf-8")
                config.load(str(file), environ={})


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_readmes_name_the_two_commands_and_the_stand_in(name: str) -> None:
    text = read(ROOT / name)
    for needed in ("make serve", "make test", "SmolLM2-135M-Instruct", "--model-path", "deepseek-v3"):
        assert needed in text


def test_both_readmes_have_the_same_commands() -> None:
    def code(name: str) -> list[tuple[str, str]]:
        return [(language, code) for _, language, code in FENCE.findall(read(ROOT / name))]

    def without_text(blocks: list[tuple[str, str]]) -> list[str]:
        return [re.sub(r'#.*|"[^"]*"|<.*?>', "", code) for _, code in blocks]

    assert without_text(code("README.md")) == without_text(code("README.zh-CN.md"))


def test_both_migration_pages_have_the_same_code() -> None:
    english, chinese = (FENCE.findall(read(DOCS / name)) for name in ("migrate.md", "migrate.zh-CN.md"))
    assert english == chinese


def test_each_catalogue_entry_is_in_the_models_page() -> None:
    text = read(DOCS / "models.md")
    assert [entry.name for entry in CATALOGUE if f"`{entry.name}`" not in text] == []


def defined_in(source: Path) -> set[str]:
    """Functions, classes and `Class.method` names that a file defines."""
    names: set[str] = set()

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.update({child.name, prefix + child.name})
                walk(child, prefix + child.name + ".")

    walk(ast.parse(read(source)), "")
    return names


def test_architecture_names_files_and_functions_that_exist() -> None:
    """A span `name()` or `ClassName` is looked for in the file that was named last before it."""
    source, wrong, checked = None, [], 0
    for span in re.findall(r"`([^`\n]+)`", prose(DOCS / "architecture.md")):
        if re.fullmatch(r"[\w/]+\.py", span):
            source = PACKAGE / span
            if not source.exists():
                wrong.append(span)
        elif re.fullmatch(r"[\w.]+\(\)|[A-Z][a-z]\w+", span):
            checked += 1
            if source is None or not source.exists() or span.removesuffix("()") not in defined_in(source):
                wrong.append(f"{span} in {source}")
    assert wrong == []
    assert checked > 20


@pytest.mark.parametrize("page", [*PAGES, EXAMPLE], ids=lambda page: page.name)
def test_no_place_that_only_one_machine_has(page: Path) -> None:
    text = read(page)
    assert re.findall(r"(?:^|[\s`\"'(=])(?:/(?:root|work|mnt|opt|home/\w+)\b[^\s`\"')]*)", text) == []
    hosts = re.findall(r"https?://([^\s/:`\"')\]>|，。；、]+)", text)
    assert [host for host in hosts if not HOSTS.fullmatch(host) and "$" not in host and "<" not in host] == []
