-- What `--search` finds: text in which each word of the query begins a word. How text is split into words is told by
-- the functions on which the indexes rest; they stand with those, in the migrations.

CREATE FUNCTION search_query(words text) RETURNS tsquery
LANGUAGE sql IMMUTABLE PARALLEL SAFE
RETURN (SELECT string_agg(quote_literal(word) || ':*', ' & ')::tsquery FROM unnest(search_words(words)) AS word);
