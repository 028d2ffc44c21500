"""Moving slots between two host pools: one small interface (`base`), one module per transport."""
