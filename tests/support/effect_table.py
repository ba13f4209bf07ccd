"""For each command, key and API call that claims an effect: the test that looks at the effect by another path.

"Saved", "pinned", "exported", "deleted": the test reads the database in another process, the cache's ledger after 1,000
more tokens, the file with another program. `tests/e2e/test_effects.py` compares these tables with what there is, so a
new command without an entry fails.
"""

from __future__ import annotations

SLASH: dict[str, str] = {
    "pin": "e2e/test_effects_turns.py::test_a_pinned_turn_is_cached_after_1000_tokens_and_after_each_resume",
    "unpin": "e2e/test_effects_turns.py::test_an_unpinned_turn_is_evicted_like_any_other",
    "undo": "e2e/test_effects_turns.py::test_an_undone_turn_is_gone_from_cache_log_and_database",
    "rewind": "engine/test_time_travel.py::test_rewind_to_evicted_turns_is_exact",
    "fork": "engine/test_time_travel.py::test_forks_share_the_past_and_never_mix",
    "retry": "e2e/test_effects_turns.py::test_a_retried_reply_takes_the_place_of_the_first",
    "edit": "e2e/test_effects_turns.py::test_an_edited_message_takes_the_place_of_the_first",
    "compact": "e2e/test_effects_turns.py::test_a_summary_is_of_the_oldest_turns_and_changes_nothing_by_itself",
    "recall": "e2e/test_effects_turns.py::test_a_search_finds_what_another_process_finds",
    "quote": "e2e/test_effects_turns.py::test_a_quoted_message_is_what_the_model_reads",
    "keep": "e2e/test_effects_turns.py::test_a_kept_text_is_cached_after_1000_tokens_and_after_a_resume",
    "read": "e2e/test_effects_turns.py::test_a_file_that_is_read_is_in_the_message",
    "clear": "e2e/test_effects_conversations.py::test_a_cleared_conversation_is_not_seen_by_the_model_and_stays_saved",
    "system": "e2e/test_effects_conversations.py::test_a_new_system_prompt_is_what_the_cache_begins_with",
    "resume": "e2e/test_effects_conversations.py::test_a_resumed_session_goes_on_with_what_was_cached",
    "title": "e2e/test_effects_conversations.py::test_a_title_is_in_the_database_and_in_the_next_process",
    "export": "e2e/test_effects_conversations.py::test_an_exported_file_has_every_message_for_another_program",
    "import": "e2e/test_effects_conversations.py::test_imported_conversations_are_in_the_database",
    "detach": "tui/test_tui_attached.py::test_detach_leaves",
    "set": "e2e/test_effects_conversations.py::test_a_changed_setting_holds_for_the_next_turn_and_after_a_resume",
    "think": "e2e/test_effects_conversations.py::test_the_switch_of_reasoning_is_in_the_prompt",
    "model": "e2e/test_effects_conversations.py::test_another_model_replies_and_is_the_one_of_the_session",
    "queue": "e2e/test_effects_app.py::test_removed_messages_of_the_queue_never_reach_the_engine",
    "theme": "e2e/test_effects_app.py::test_a_theme_is_that_of_the_next_start",
    "copy": "e2e/test_effects_app.py::test_a_copied_reply_is_what_the_terminal_gets",
}
"""Slash commands."""

SLASH_SHOWS: dict[str, str] = {
    "help": "prints the commands",
    "stats": "prints figures",
    "sessions": "prints the list of sessions",
    "quit": "the chat was saved as it went: `resume` and `clear` look at that",
    "settings": "opens a screen; what it writes is in test_effects_keys.py",
    "sidebar": "shows or hides a panel",
}
"""Slash commands that claim nothing, and why."""

COMMANDS: dict[str, str] = {
    "sessions rename": "e2e/test_effects_commands.py::test_a_renamed_session_has_its_title_in_the_database",
    "sessions delete": "e2e/test_effects_commands.py::test_no_byte_of_a_deleted_session_is_on_the_disk",
    "sessions export": "e2e/test_effects_commands.py::test_an_exported_session_is_whole_for_another_program",
    "sessions import": "e2e/test_effects_commands.py::test_imported_messages_are_in_the_database",
    "sessions restore-backup": "e2e/test_effects_commands.py::test_a_restored_backup_is_what_another_process_reads",
    "config": "e2e/test_effects_commands.py::test_a_trusted_file_holds_in_the_next_process_until_it_is_not",
    "replay": "replay/test_replay.py::test_a_run_that_holds",
    "bench": "benchmarks/test_bench.py::test_the_command",
    "recall-bench": "benchmarks/test_recall_bench.py::test_the_command",
    "ppl": "benchmarks/test_perplexity.py::test_the_command",
    "sweep": "benchmarks/test_sweep.py::test_the_command",
    "verify": "verify/test_verify.py::test_the_command_as_json",
    "sessions repair": "e2e/test_doctor.py::test_broken_indexes_are_found_and_mended",
}
"""Commands of the command line."""

COMMANDS_SHOW: dict[str, str] = {
    "serve": "its calls are below",
    "attach": "its chats are those of a server",
    "web": "its chats are those of the app",
    "acp": "its chats are saved like any other",
    "monitor": "only reads",
    "sessions": "lists",
    "sessions list": "lists",
    "sessions show": "prints",
    "sessions backups": "lists",
    "models": "lists; fetches nothing",
    "doctor": "examines",
    "completion": "prints a script",
}
"""Those that claim nothing, or whose claims are those of others, and why."""

CALLS: dict[str, str] = {
    "POST /v1/chat/completions": "e2e/test_effects_commands.py::test_a_completion_is_a_saved_session",
    "POST /v1/responses": "e2e/test_effects_commands.py::test_a_response_continues_the_saved_session_that_its_id_names",
}
"""Calls of the API."""

CALLS_SHOW: dict[str, str] = {
    "GET /v1/models": "lists",
    "GET /v1/models/{name:path}": "shows one",
    "GET /metrics": "shows figures",
}
"""Calls that only read."""

KEYS: dict[str, str] = {
    "prompt.send": "e2e/test_effects_keys.py::test_a_sent_message_is_in_the_database_and_in_the_cache",
    "chat.stop": "e2e/test_effects_keys.py::test_a_stopped_reply_is_saved_as_far_as_the_model_wrote_it",
    "map.pin": "e2e/test_effects_keys.py::test_a_turn_pinned_in_the_map_is_pinned_in_database_and_cache",
    "finder.keep": "e2e/test_effects_keys.py::test_a_result_that_is_kept_is_pinned_in_database_and_cache",
    "settings.write": "e2e/test_effects_keys.py::test_a_written_setting_is_in_the_file_and_holds_at_the_next_start",
    "settings.reset": "e2e/test_effects_keys.py::test_a_setting_that_is_reset_is_the_default_for_the_next_turn",
    "chat.copy_reply": "e2e/test_effects_app.py::test_a_copied_reply_is_what_the_terminal_gets",
    "chat.queue_drop": "tui/test_tui_queue.py::test_messages_are_removed_one_by_one_or_all_at_once",
    "chat.queue_clear": "tui/test_tui_queue.py::test_messages_are_removed_one_by_one_or_all_at_once",
    "chat.interrupt": "tui/test_tui_input.py::test_ctrl_c_copies_a_selection_first",
    "prompt.redo": "tui/test_tui_control.py::test_ctrl_c_empties_the_input_and_undo_brings_it_back",
}
"""Keys of the app."""

KEYS_SHOW = {
    *("prompt.newline", "prompt.complete", "prompt.edit", "prompt.delete_or_leave", "prompt.page_up"),
    *("prompt.page_down", "chat.map", "chat.turn_up", "chat.turn_down", "chat.line_up", "chat.line_down", "chat.top"),
    *("chat.follow", "chat.recall", "chat.sessions", "chat.models", "chat.thoughts", "chat.sidebar", "chat.settings"),
    *("app.help", "app.palette", "app.quit", "map.left", "map.right", "map.up", "map.down", "map.open", "map.leave"),
    *("finder.close", "finder.up", "finder.down", "finder.page_up", "finder.page_down", "settings.close"),
    *("settings.up", "settings.down", "settings.page_up", "settings.page_down", "help.close"),
}
"""Keys that move, open, close or type: what they do is what is seen."""
