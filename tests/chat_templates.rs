//! Chat templates against transformers.

use crate::golden;
use lonas::text::{ChatError, ChatTemplate, Message};

#[derive(serde::Deserialize)]
struct Golden {
    rendered: Vec<Rendered>,
}

#[derive(serde::Deserialize)]
struct Rendered {
    name: String,
    template: String,
    messages: Vec<Turn>,
    text: String,
}

#[derive(serde::Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[test]
fn conversations_are_written_as_in_transformers() {
    let golden: Golden = golden::json("chat.json");
    assert!(golden.rendered.len() > 6);
    for Rendered { name, template, messages, text } in golden.rendered {
        let template = ChatTemplate::new(&template, "<s>", "</s>").unwrap();
        let messages = messages.into_iter().map(|Turn { role, content }| Message { role, content });
        assert_eq!(template.render(&messages.collect::<Vec<_>>(), false).unwrap(), text, "{name}");
    }
}

#[test]
fn what_is_no_generation_tag_is_left_alone() {
    for source in ["{% generation", "{% generations %}", "{% generation x %}", "{%", "{% endgeneration %}"] {
        let error = ChatTemplate::new(source, "", "").unwrap_err();
        assert!(matches!(error, ChatError::Template(_)), "{source}: {error}");
    }
    let words = ChatTemplate::new("{{ 'generation' }} generation {# {% generation %} #}", "", "").unwrap();
    assert_eq!(words.render(&[], false).unwrap(), "generation generation ");
}
