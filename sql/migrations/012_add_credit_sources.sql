-- Where an entry comes from, such as the number of an invoice.

ALTER TABLE credit_transactions
    ADD COLUMN source text,
    ADD CONSTRAINT credit_transactions_source CHECK (source <> '' AND length(source) <= 255);
