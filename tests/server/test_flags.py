"""The flags of `streamchat serve`."""

from __future__ import annotations

from streamchat.cli import flags
from streamchat.cli.parser import build_parser, parse
from streamchat.config.loader import flag_of
from streamchat.config.settings import setting_fields, spec_of


def test_every_setting_except_those_of_the_interface_has_a_flag() -> None:
    known = build_parser()[1].choices["serve"]._option_string_actions
    without = {name for name in setting_fields() if flag_of(name) not in known}
    assert without == {name for name in setting_fields() if spec_of(name).section == "interface"}


def test_flags_change_the_settings() -> None:
    given = ["--adapter", "a", "--decode", "plain", "--dry-multiplier", "0.8", "--loop-guard", "off"]
    args = parse(["serve", *given, "--template-arg", "enable_thinking=false"])
    settings = flags.configuration_of(args).settings
    assert (settings.adapter, settings.decode, settings.loop_guard) == ("a", "plain", "off")
    assert settings.dry_multiplier == 0.8
    assert "enable_thinking" in str(settings.template_args)
