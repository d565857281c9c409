/* Entries of guests, for assembly: descriptors, and the way from Multiboot's 32-bit protected mode to that of the build. */
#define PAGE_SIZE 4096
#define STACK_SIZE 16384
#define CODE32 0x08
#define CODE64 0x10
#define DATA 0x18

#ifdef __x86_64__
#define CR0_WANTED 0x80010033 /* PG WP NE ET MP PE */
#define CR4_WANTED 0x620      /* OSXMMEXCPT OSFXSR PAE */
#else
#define CR0_WANTED 0x00000033 /* NE ET MP PE */
#define CR4_WANTED 0x600      /* OSXMMEXCPT OSFXSR */
#endif
#define EFER 0xc0000080
#define EFER_LME 0x100

/* The descriptors of the selectors above. */
    .macro flat_descriptors
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00af9b000000ffff
    .quad 0x00cf93000000ffff
    .endm

/* Data segments and control registers, from 32-bit protected mode; a far jump to CODE64 completes the 64-bit build's. */
    .macro enter_mode
    mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov %eax, %fs
    mov %eax, %gs
    mov $CR4_WANTED, %eax
    mov %eax, %cr4
#ifdef __x86_64__
    mov $page_root, %eax
    mov %eax, %cr3
    mov $EFER, %ecx
    rdmsr
    or $EFER_LME, %eax
    wrmsr
#endif
    mov $CR0_WANTED, %eax
    mov %eax, %cr0
    .endm

/* `page_root`: the first 4 GiB, each 2 MiB page mapped to itself. `access` is 3 for a writable page, 7 for user mode too. */
    .macro identity_map access
    .balign PAGE_SIZE
page_root:
    .quad page_directory_pointers + \access
    .fill 511, 8, 0
page_directory_pointers:
    .set page, 0
    .rept 4
    .quad page_directory + page + \access
    .set page, page + PAGE_SIZE
    .endr
    .fill 508, 8, 0
page_directory:
    .set page, 0
    .rept 2048
    .quad page + 0x80 + \access
    .set page, page + 0x200000
    .endr
    .endm

/* Real mode at a page below 1 MiB that this was copied to, CS:0 being the page, to `target` in 32-bit protected mode. */
    .macro ap_trampoline target
    .globl trampoline_start, trampoline_end
    .code16
trampoline_start:
    cli
    mov %cs, %ax
    mov %ax, %ds
    lgdtl (trampoline_gdt_pointer - trampoline_start)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $CODE32, $\target
trampoline_gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:
    .endm
